"""What a strategy would decide by what a router remembers of a request: a mesh made of a record.

A rehearsal as a shadow's (shadow.py), of a request that is over: engines, what they are able to, loads,
labels and cached prefixes are those of the record, actions are answered at once and do nothing. What no
record has is missing here: the prompt's tokens (all are 0), values of attributes (empty, but for priority
0), links between engines (not measured), what the strategy had in ``mesh.state``, and its plan. Knows no
router and sends nothing.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from functools import partial

import msgspec

from microserve.protocol.errors import StrategyError
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.request.attributes import PRIORITY
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.messages.strategy.decisions import Attempt, EngineSeen, Explanation, SendSeen
from microserve.protocol.types import WIRE_VERSION
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.authoring.driver import Driver
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.view import StrategyState
from microserve.services.router.engines.load import LoadBook
from microserve.services.router.engines.prediction import engine_view
from microserve.services.router.oversight.overseer import Overseer
from microserve.services.router.request.decision import Decision, Send
from microserve.services.router.request.phase import PhaseClock
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.request.trail import Trail
from microserve.services.router.rollout.score import Cost, cost_of
from microserve.services.router.rollout.shadow import DECISION_S
from microserve.services.router.rollout.shadow_engine import ShadowConnection


class Replayed(msgspec.Struct, frozen=True):
    """What the other strategy decides in the place of one attempt."""

    strategy: str
    version: int
    mistake: str = ""
    """Why it decides nothing."""
    choices: list[str] = []
    """Each pick in a line."""
    sends: list[SendSeen] = []
    engine_id: str = ""
    begin: int = 0
    is_same_engine: bool = False
    """It decodes where the request did."""
    ttft_s: float | None = None
    """Predicted by the router's cost model; None: of too little is known."""
    done_ttft_s: float | None = None
    """Predicted likewise for what was done."""
    unknown: list[str] = []
    """Engines of which nothing says what they are able to: here they are to everything."""


class _Facts:
    """What a record knows of an engine, as its connection would say it; nothing can be asked of it."""

    def __init__(self, seen: EngineSeen, block_size: int) -> None:
        self.engine_id = seen.engine_id
        self.labels: Sequence[str] = seen.labels
        self.barred: Sequence[str] = ()
        self.load: EngineLoad = seen.load
        self.load_at = asyncio.get_running_loop().time() - seen.load_age_s
        no_bound = 1 << 31
        self.info = EngineInfo(
            engine_id=seen.engine_id,
            incarnation=1,
            address="",
            events_address="",
            replay_address="",
            model="",
            labels=seen.labels,
            block_size=seen.geometry.block_size or block_size,
            num_blocks=seen.num_blocks,
            num_layers=0,
            max_model_len=no_bound,
            vocab_size=no_bound,
            eos_token_ids=[],
            layout_hash="",
            heap="",
            wire_version=WIRE_VERSION,
            numerics=seen.numerics,
            backend=seen.backend,
            can=seen.can,
            geometry=seen.geometry,
            split_tokens=seen.split_tokens,
            recompute_tokens=seen.recompute_tokens,
            cluster=seen.cluster,
        )


async def replay(
    strategy: Strategy, each: Explanation, attempt: Attempt, overseer: Overseer | None = None
) -> Replayed:
    """Let it decide about ``attempt`` of ``each``. What it does wrong is told in ``mistake``."""
    name, version = strategy.name, strategy.version
    if not attempt.engines:
        return Replayed(name, version, "this attempt has no record of engines: nothing was picked in it")
    loop = asyncio.get_running_loop()
    request = Request(
        each.request_id,
        [0] * attempt.num_tokens,
        SamplingParams(max_tokens=each.max_tokens),
        loop.time() + DECISION_S,
        each.block_size,
        num_output_tokens=attempt.num_tokens - each.num_prompt_tokens,
        attributes=dict.fromkeys(each.attributes, "") | {PRIORITY: "0"},
    )
    book = _book(attempt.engines)
    facts = [_Facts(seen, each.block_size) for seen in attempt.engines]
    unknown = [seen.engine_id for seen in attempt.engines if seen.can is None]
    connections = [ShadowConnection(fact, partial(_held, attempt, fact.engine_id)) for fact in facts]
    scope = RequestScope(request, LoadBook().open(), PhaseClock(loop.time()), call_timeout_s=DECISION_S)
    scope.trail = trail = Trail(name, version, attempt.num_tokens, scope.decision, loop.time(), loop.time())
    views = {c.engine_id: engine_view(c, book, loop.time()) for c in connections}
    mesh = Mesh(
        scope, lambda: connections, book, lambda *_: attempt.cached, random.Random(0), StrategyState()
    )
    try:
        async with asyncio.timeout(DECISION_S):
            await Driver(overseer, lambda *_: None).rehearse(strategy, strategy(mesh, request))
        if not scope.decision.engine_id:
            raise StrategyError("the strategy ended without a decision")
    except Exception as mistake:
        return Replayed(name, version, f"{type(mistake).__name__}: {mistake}", unknown=unknown)
    finally:
        scope.close()
    made, done = scope.decision, _decision(attempt)

    def cost(decision: Decision) -> Cost | None:
        return cost_of(decision, attempt.num_tokens, attempt.cached, views, book.links.transfer_s)

    own, others = cost(made), cost(done) if done.engine_id else None
    return Replayed(
        name,
        version,
        choices=trail.in_words(),
        sends=[SendSeen(*send) for send in made.sends],
        engine_id=made.engine_id,
        begin=made.begin,
        is_same_engine=made.engine_id == done.engine_id,
        ttft_s=None if own is None else own.ttft_s,
        done_ttft_s=None if others is None else others.ttft_s,
        unknown=unknown,
    )


def _held(attempt: Attempt, engine_id: str) -> int:
    return attempt.cached.get(engine_id, 0)


def _book(engines: Sequence[EngineSeen]) -> LoadBook:
    """With as much in it as there was."""
    book = LoadBook()
    for seen in engines:
        here = seen.engine_id
        for _ in range(seen.own_sequences):
            book.open().reserve_sequence(here)
        account = book.open()
        account.reserve_prefill(here, "then", seen.own_tokens)
        if seen.own_transfer_tokens:
            account.begin_transfer("then", here, here, seen.own_transfer_tokens)
    return book


def _decision(attempt: Attempt) -> Decision:
    sends = [Send(send.source, send.target, send.begin, send.end) for send in attempt.sends]
    return Decision(sends, attempt.engine_id, attempt.begin, attempt.awaits_first)
