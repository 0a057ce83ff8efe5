"""What operators see: ``/view``, in JSON and as a feed of what changes."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Mapping
from typing import Any, TypeVar
from urllib.parse import parse_qs

import msgspec

from microserve.gateway.http.errors import ClientGone, NotKept
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.http.sse import PING, EventStream
from microserve.gateway.keys.usage import Counts
from microserve.gateway.state import GatewayState
from microserve.gateway.view.forms import (
    AlarmForm,
    HealthForm,
    KeyForm,
    KeysForm,
    MeshForm,
    PhaseForm,
    RequestDetail,
    StrategiesForm,
)
from microserve.gateway.view.history import INTERVAL_S
from microserve.gateway.view.naming import named
from microserve.gateway.view.query import query_of
from microserve.gateway.view.requests import timeline
from microserve.protocol.errors import InvalidRequest, MeshError, QueueFull
from microserve.protocol.messages.strategy.decisions import Explained

FEED_INTERVAL_S = 0.5
MAX_READERS = 64
"""Of the feed of one process."""
MAX_HISTORY = 200
SNAPSHOT_ENDED = 200
MAX_NAME_CHARS = 256

_WHY_DIFFERS = "a self-check found that their answers differ: no KV goes from the one to the other"
_WHY_ALONE = "a self-check found that its answer with its own cache differs: it exchanges KV with nobody"

T = TypeVar("T")


async def mesh(state: GatewayState, exchange: Exchange) -> None:
    view = state.view
    now = view.clock()
    age_s = view.mesh.index_age_s(now)
    await _reply(
        exchange,
        MeshForm(
            at=view.wall_clock(),
            index_alive=view.link is not None and view.mesh.is_index_alive(now),
            index_age_s=age_s if age_s != float("inf") else -1.0,
            routers=state.routers.status(),
            engines=view.mesh.engines(),
            pairs=view.mesh.pairs(),
            interval_s=INTERVAL_S,
            history=view.mesh.history.forms(),
        ),
    )


async def requests(state: GatewayState, exchange: Exchange) -> None:
    await _reply(exchange, await state.view.ended(query_of(_query(exchange))))


async def request(state: GatewayState, exchange: Exchange) -> None:
    """By its id in any of its forms; what the routers remember of it comes with it."""
    wanted: str = exchange.path_params["request_id"]
    if len(wanted) > MAX_NAME_CHARS:
        raise InvalidRequest(f"an id has at most {MAX_NAME_CHARS} characters", field="request_id")
    form = await state.view.find(wanted)
    link = state.view.link
    told: list[Explained] = []
    silent: list[str] = []
    if link is not None:
        is_alive = state.view.mesh.is_index_alive(state.view.clock())
        # Who is known to be silent is not waited for.
        told, silent = await _or(link.explain(wanted), ([], ["index"])) if is_alive else ([], ["index"])
    records = [named(each) for said in told for each in said.found]
    if form is None and not records:
        raise NotKept(f"no request {wanted[:128]!r} is remembered here", field="request_id")
    parts: list[PhaseForm] = []
    if form is not None and form.at:
        found = (each for said in told for each in said.found if each.request_id == form.id)
        attempts = next((each.attempts for each in found), [])
        parts = timeline(form, attempts[-1] if attempts else None)
    await _reply(exchange, RequestDetail(form, parts, records, silent))


async def strategies(state: GatewayState, exchange: Exchange) -> None:
    link = state.view.link
    if link is None:
        raise NotKept("there is no view here: gateway.view_requests is 0")
    status = await link.status()
    history, (told, _) = await asyncio.gather(
        link.history(MAX_HISTORY), _or(link.explain(scores_of=""), ([], []))
    )
    state.view.control_version = status.state.version
    await _reply(
        exchange,
        StrategiesForm(
            at=state.view.wall_clock(),
            version=status.state.version,
            durable=status.durable,
            entries=named(status.state.entries),
            routers=named(status.routers),
            ramps=named(status.ramps),
            history=named(history.records),
            scores=[named(each) for said in told for each in said.scores],
        ),
    )


async def keys(state: GatewayState, exchange: Exchange) -> None:
    book, streams, wall = state.quotas.book, state.quotas.streams(), state.view.wall_clock()
    known = state.keys.by_name()
    forms = [
        KeyForm(
            name=name,
            requests=(counts := book.total.get(name, Counts())).requests,
            refused=counts.refused,
            prompt_tokens=counts.prompt_tokens,
            cached_tokens=counts.cached_tokens,
            output_tokens=counts.output_tokens,
            streams=streams.get(name, 0),
            tokens_today=book.tokens_of(wall, name),
            tokens_per_day=key.daily_token_budget,
            max_streams=key.concurrent_streams,
            operator=key.operator,
        )
        for name, key in sorted(known.items())
    ]
    await _reply(exchange, KeysForm(wall, forms))


async def health(state: GatewayState, exchange: Exchange) -> None:
    await _reply(exchange, health_of(state))


def health_of(state: GatewayState) -> HealthForm:
    """What is wrong, as far as this process knows without asking anybody."""
    view = state.view
    alarms: list[AlarmForm] = []
    if view.link is not None and not view.mesh.is_index_alive(view.clock()):
        alarms.append(AlarmForm("index.silent", "index", "the index does not answer: what is shown is old"))
    for router in state.routers.status():
        if not router["alive"]:
            alarms.append(AlarmForm("router.silent", router["address"], "the router does not answer"))
    for engine in view.mesh.engines():
        if engine.state in ("lost", "refused"):
            alarms.append(AlarmForm(f"engine.{engine.state}", engine.id, engine.detail))
    for pair in view.mesh.suspects:
        subject = f"{pair.source} → {pair.target}" if pair.target else pair.source
        alarms.append(AlarmForm("check.differs", subject, _WHY_DIFFERS if pair.target else _WHY_ALONE))
    is_ready = state.routers.ready and not state.draining
    if not is_ready:
        alarms.append(AlarmForm("gateway.not_ready", "gateway", "no request can be served here now"))
    return HealthForm(
        at=view.wall_clock(),
        version=state.version,
        ready=is_ready,
        draining=state.draining,
        alarms=alarms,
        checks=view.mesh.checks(),
        limits={"streams": state.num_choices, "max_streams": state.max_choices},
    )


async def feed(state: GatewayState, exchange: Exchange) -> None:
    """Server-sent events: a snapshot, then what changes; who comes back with ``Last-Event-ID`` gets what it
    missed, if that is still there."""
    view = state.view
    if view.num_readers >= MAX_READERS:
        raise QueueFull(f"{MAX_READERS} already watch here", retry_after_s=5.0)
    gone = asyncio.Event()
    view.num_readers += 1
    try:
        with exchange.watch(lambda _: gone.set()):
            async with EventStream(exchange, on_idle=lambda: None, on_stall=lambda _: gone.set()) as stream:
                await _feed(state, exchange, stream, gone)
    finally:
        view.num_readers -= 1
        if not view.num_readers:
            view.feed.rest()


async def _feed(state: GatewayState, exchange: Exchange, stream: EventStream, gone: asyncio.Event) -> None:
    view = state.view
    await _look(state)
    came_back = exchange.header(b"last-event-id")
    number = None if came_back is None else view.feed.resumed(came_back.decode("latin-1"))
    if number is None:
        base = number, _ = view.feed.base  # another reader's look meanwhile is news for this one
        ended = (await view.ended(query_of({"limit": str(SNAPSHOT_ENDED)}))).ended
        await stream.write(view.feed.snapshot(ended[::-1], base))
    while not (gone.is_set() or state.draining):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FEED_INTERVAL_S):
                await gone.wait()
        await _look(state)
        events = view.feed.since(number)
        number = view.feed.number
        await stream.write(events or PING)
    if not gone.is_set():
        await stream.close()
        return
    raise ClientGone("the client closed the connection")


async def _look(state: GatewayState) -> None:
    """Once for all readers: who comes within the interval gets what is there."""
    await state.view.look_at_most_every(FEED_INTERVAL_S / 2, lambda: health_of(state))


async def _or(asked: Awaitable[T], otherwise: T) -> T:
    """What the index says, or something else where it says nothing."""
    try:
        return await asked
    except MeshError:
        return otherwise


async def _reply(exchange: Exchange, body: msgspec.Struct) -> None:
    await exchange.reply(200, msgspec.json.encode(body), {"cache-control": "no-store"})


def _query(exchange: Exchange) -> Mapping[str, str]:
    """The last value of each."""
    found: dict[str, list[Any]] = parse_qs(exchange.query.decode("latin-1"))
    return {name: values[-1] for name, values in found.items()}
