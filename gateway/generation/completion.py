"""One generation request from its body to its last byte, streamed or not.

Owns the order of things: what may be refused before anything is sent, the merging of choices into one
answer, and the end whatever happened: cancelled on the bus, counted, one canonical line a choice.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from time import monotonic, time
from typing import Generic, TypeVar

import msgspec
import structlog

from microserve.gateway.api.dialect import Dialect
from microserve.gateway.api.fields import RequestBody
from microserve.gateway.api.format import AnswerFormat, Answering, Ending, FinishedChoice
from microserve.gateway.api.parse import parsed
from microserve.gateway.generation.accounting import account, running_forms, usage_of
from microserve.gateway.generation.constraint import constraint_of
from microserve.gateway.generation.group import ChoiceGroup
from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.gateway.http.errors import ClientGone, NotKept
from microserve.gateway.http.exchange import Exchange, exact_of, strategy_of, timeout_of, warning_header
from microserve.gateway.http.sse import EventStream
from microserve.gateway.request.prompts import prompts_of
from microserve.gateway.request.reading import reading_of
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.request.sampling import check_choices, check_prompts, sampling_of
from microserve.gateway.routers.mailbox import Mailbox
from microserve.gateway.state import GatewayState
from microserve.gateway.text.answer.choice import Choice, Piece
from microserve.gateway.view.forms import RequestForm
from microserve.protocol import log
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError

_logger = structlog.get_logger()

B = TypeVar("B", bound=RequestBody)

INLINE_TOLD_TOKENS = 2048
"""The reply of an answer with more tokens beside its text is written in a thread."""


class Completion(Generic[B]):
    """One HTTP request of any API; ``run`` once."""

    def __init__(self, state: GatewayState, exchange: Exchange, dialect: Dialect[B]) -> None:
        self._state = state
        self._exchange = exchange
        self._dialect = dialect
        self._group = ChoiceGroup(state, exchange)
        self._n = self._num_told = 1
        """Choices of each prompt that are generated, and that the client gets."""
        self._stream = False
        self._warnings: Sequence[str] = ()
        """What was asked for and is not done as asked."""
        self._recalled = ExitStack()
        """Counts what was kept and is needed until the prompt is made, as the body is counted."""
        self._model = state.model
        """Whose answer it is: an adapter, or the model itself."""
        self._num_held = 0
        """Bytes that are to be kept with the answer."""

    async def run(self) -> None:
        """Answer the request, then account for it, whatever happened."""
        failure: MeshError | None = InternalError("cut off while the gateway stopped")
        group = self._group
        self._state.view.began(self)
        try:
            failure = await self._exchange.answer(self._serve)
            group.stamp_end()
            await group.settle()
        finally:
            self._state.view.over(self)
            group.release()
            if self._num_held and self._state.store is not None:
                self._state.store.give_back(self._num_held)
            group.stamp_end()
            account(
                self._state,
                self._exchange,
                group.choices,
                group.times,
                n=self._n,
                stream=self._stream,
                failure=failure,
                attributes=group.attributes,
                model=self._model,
            )
            group.trace.end(
                self._exchange,
                group.choices,
                group.times,
                usage=lambda: usage_of(group.choices, self._n),
                sampling=group.sampling,
                n=self._n,
                stream=self._stream,
                failure=failure,
                model=self._model,
            )

    def forms(self, now: float) -> list[RequestForm]:
        """As it stands, for the view."""
        group = self._group
        return running_forms(
            self._state, self._exchange, group.choices, group.times, now, stream=self._stream
        )

    async def _serve(self) -> None:
        """From the body to the last byte of an answer that goes well."""
        state, exchange, inbox = self._state, self._exchange, self._group.inbox
        try:
            ttl_s = timeout_of(exchange, state.request_timeout_s)
            strategy = state.strategy_for(strategy_of(exchange), exchange.key)
            exact = exchange.key.exact(exact_of(exchange))
            body = await exchange.read_body(state.bodies)
            with exchange.watch(inbox.fail):
                with state.bodies.hold(len(body)), self._recalled:
                    answer = await self._submit(body, ttl_s, strategy, exact)
                del body  # a long prompt must not stay for as long as its answer takes
                await (self._stream_answer(answer) if self._stream else self._collect_answer(answer))
        finally:
            # At once, before anything is awaited: every step that an engine takes from here on is wasted.
            inbox.cancel()

    async def _submit(
        self, body: bytes, ttl_s: float, strategy: str | None, exact: bool | None
    ) -> AnswerFormat:
        """Send the choices on their way; how their answer will look."""
        state, group = self._state, self._group
        if len(body) > INLINE_BODY_NBYTES:
            request, prompts = await self._prepare_large(body)
            state.check_model(request.model, self._exchange.key)
            self._begin(request)
            limits = state.routers.limits
        else:
            found = parsed(body, self._dialect.body, state.shape)
            state.check_model(found.body.model, self._exchange.key)
            needed = self._dialect.needs(found.body)
            kept = await self._find(needed) if needed else {}
            if len(body) + sum(map(len, kept.values())) > INLINE_BODY_NBYTES:
                request, prompts = await self._prepare_large(body, kept)
                self._begin(request)
                limits = state.routers.limits
            else:
                request = self._dialect.request(found.body, kept)
                request.warnings += found.warnings
                self._begin(request)
                limits = state.routers.limits
                group.times.tokenising = monotonic()
                prompts = await prompts_of(request, state.tokenizer, limits)
            del found, kept
        sampling = sampling_of(request, limits, max(map(len, prompts)), state.defaults)
        check_prompts(request, sampling, prompts)
        reading = reading_of(request, state.parsers)
        grammar, relaxed = await constraint_of(state, request, reading, prompts[0], group.inbox)
        self._warnings = (*request.warnings, *relaxed)
        if grammar is not None:
            sampling = msgspec.structs.replace(sampling, grammar=grammar)
        attributes = state.attributes.read(request, self._exchange)
        group.submit(
            prompts,
            sampling,
            request,
            ttl_s=ttl_s,
            strategy=strategy,
            attributes=attributes,
            exact=exact,
            reading=reading,
        )
        answering = Answering(
            request,
            sampling,
            unique_id=self._exchange.unique_id,
            created=int(time()),
            model=request.model or state.model,
            fingerprint=f"microserve-{state.version}",
            num_prompt_tokens=sum(map(len, prompts)),
            keeps=self._holds(request),
        )
        return self._dialect.format(answering)

    def _holds(self, request: GenerateRequest) -> bool:
        """Whether there is room for what is to be kept with the answer until that is there."""
        nbytes, store = len(request.context), self._state.store
        if nbytes and store is not None and store.hold(nbytes):
            self._num_held = nbytes
            return True
        request.context = b""  # as long as a body, it would stay for as long as the answer takes
        return False

    async def _prepare_large(
        self, body: bytes, kept: Mapping[str, bytes] | None = None
    ) -> tuple[GenerateRequest, Sequence[Sequence[int]]]:
        """By a helper: its request and its prompts' ids. Raises what has ended the inbox meanwhile."""
        state, inbox = self._state, self._group.inbox
        state.check_some_model(self._exchange.key)  # the name in it comes later
        self._group.times.tokenising = monotonic()
        prepared = await state.helpers.prepare(
            *(self._dialect.name, body, state.routers.known_limits),
            field=self._dialect.prompt_field,
            is_wanted=lambda: inbox.error is None,
            find=self._find,
            kept=kept,
        )
        if prepared is None:
            assert inbox.error is not None
            raise inbox.error
        return prepared

    async def _find(self, names: Mapping[str, str]) -> Mapping[str, bytes]:
        """What was kept for this client under these names, which came by these fields."""
        store, owner, bodies = self._state.store, self._exchange.key.owner, self._state.bodies
        found: dict[str, bytes] = {}
        num_left = bodies.max_body_nbytes
        for name, field in names.items():
            data = None if store is None else await store.get(owner, name)
            if data is None:
                raise NotKept(f"{field}: no response {name[:128]!r} is kept here", field=field)
            num_left -= len(data)
            if num_left < 0:
                raise InvalidRequest(
                    f"{field}: what is referred to has more than {bodies.max_body_nbytes} bytes", field=field
                )
            self._recalled.enter_context(bodies.hold(len(data)))
            found[name] = data
        return found

    async def _keep(self, answer: AnswerFormat) -> None:
        """Before its client hears of the end, who may go on from it at once."""
        if self._state.store is not None and answer.kept is not None:
            await self._state.store.put(self._exchange.key.owner, *answer.kept)

    def _begin(self, request: GenerateRequest) -> None:
        check_choices(request, self._state.max_n)
        self._n, self._stream = request.num_generated, request.stream
        self._model = request.model or self._state.model
        self._num_told = request.n

    async def _collect_answer(self, answer: AnswerFormat) -> None:
        group = self._group
        pieces: list[list[Piece]] = [[] for _ in group.choices]
        while not group.over:
            for mailbox in await group.inbox.wait():
                choice, piece = group.take(mailbox)
                pieces[choice.index].append(piece)
            group.raise_failure()
        await group.settle()
        choices = [
            _finished(place, choice, pieces[choice.index], reason)
            for place, choice in enumerate(group.told(self._num_told, self._n))
            if (reason := choice.told_reason) is not None
        ]
        counts = usage_of(group.choices, self._n)
        if sum(choice.num_told for choice in choices) > INLINE_TOLD_TOKENS:
            body = await asyncio.to_thread(answer.reply, choices, counts)
        else:
            body = answer.reply(choices, counts)
        await self._keep(answer)
        await self._exchange.reply(200, body, self._mesh_headers())

    def _mesh_headers(self) -> dict[str, str]:
        """Who served what there is of the answer when its head is sent."""
        served, numerics = self._group.served, self._group.numerics
        headers = {} if numerics is None else {"x-microserve-exact": numerics.promise}
        if served is not None:
            headers["x-microserve-strategy"] = served.strategy
            headers["x-microserve-strategy-version"] = str(served.strategy_version)
            headers["x-microserve-engines"] = ",".join(served.engines)
        return headers | warning_header(self._warnings)

    async def _stream_answer(self, answer: AnswerFormat) -> None:
        group, inbox = self._group, self._group.inbox
        stream = EventStream(
            self._exchange, on_idle=inbox.poke, on_stall=inbox.fail, headers=self._mesh_headers
        )
        async with stream:
            try:
                inbox.take_at_once = lambda mailbox: self._write_at_once(answer, stream, mailbox)
                try:
                    while not group.over:
                        ready = await inbox.wait()
                        if not ready:
                            await stream.ping(answer.ping())
                            continue
                        await self._stream_ready(answer, stream, ready)
                        group.raise_failure()
                finally:
                    inbox.take_at_once = None
                counts = None
                if answer.needs_usage:
                    await group.settle()
                    counts = usage_of(group.choices, self._n)
                last = answer.end(counts)
                await self._keep(answer)
                await stream.close(last)
            except MeshError as error:
                if self._exchange.started and not isinstance(error, ClientGone):
                    inbox.cancel()
                    # No [DONE]: that is how a client tells a broken stream from a whole one.
                    await stream.close(answer.failed(self._exchange.problem_of(error)))
                raise

    def _write_at_once(self, answer: AnswerFormat, stream: EventStream, mailbox: Mailbox) -> bool:
        """Tokens in the middle of a plain answer, to a client that reads: from the bus to the socket in one
        go. False, and nothing is done, where it is more than that."""
        choice = self._group.choices[mailbox.index]
        if mailbox.over or not (choice.opened and choice.is_plain and stream.takes_more):
            return False
        try:
            _, piece = self._group.take(mailbox)
            if piece.text:
                stream.write_now(answer.delta(choice.index, piece))
        except MeshError as error:
            self._group.inbox.fail(error)
        except Exception:  # one request's fault must not cost others the rest of their message
            _logger.exception(log.REQUEST_FAILED, http_request_id=self._exchange.request_id)
            self._group.inbox.fail(InternalError("see the gateway's log"))
        return True

    async def _stream_ready(self, answer: AnswerFormat, stream: EventStream, ready: list[Mailbox]) -> None:
        """Write everything that has come in one piece."""
        events: list[bytes] = []
        finished: list[Choice] = []
        for mailbox in ready:
            choice, piece = self._group.take(mailbox)
            if not piece:
                continue
            if not choice.opened:
                # All in order before any says something: clients make their list of choices of these.
                for each in self._group.choices:
                    each.opened = True
                    events.append(answer.opening(each.index))
            if piece.text or piece.tokens or piece.events:
                events.append(answer.delta(choice.index, piece))
            if (reason := choice.told_reason) is not None:
                ending = Ending(reason, choice.numerics.promise, choice.stop_string)
                events.append(answer.finish(choice.index, ending))
                finished.append(choice)
        if events:
            await stream.write(b"".join(events))
        if not self._group.over:  # else they end with the answer, to which more may belong
            for choice in finished:
                choice.times.ended = monotonic()


def _finished(place: int, choice: Choice, pieces: list[Piece], reason: str) -> FinishedChoice:
    return FinishedChoice(
        place,
        "".join(piece.text for piece in pieces),
        [token for piece in pieces for token in piece.tokens],
        Ending(reason, choice.numerics.promise, choice.stop_string),
        [event for piece in pieces for event in piece.events] if choice.is_read else None,
        pieces,
        choice.scored,
    )
