"""One generation request from its body to its last byte, streamed or not.

Owns the order of things: what may be refused before anything is sent, the merging of sequences into one
answer, and the end whatever happened: cancelled on the bus, counted, one canonical line a choice.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic, time
from typing import Generic, TypeVar

import structlog

from microserve.gateway.generation.accounting import account, usage_of
from microserve.gateway.generation.group import SequenceGroup
from microserve.gateway.http.errors import ClientGone, problem_of
from microserve.gateway.http.exchange import Exchange, strategy_of, timeout_of
from microserve.gateway.http.sse import DONE, EventStream, event
from microserve.gateway.openai.answer import AnswerFormat, Choice
from microserve.gateway.openai.sampling import ModelLimits, options_of, sampling_of
from microserve.gateway.openai.schema import GenerationRequest, parse
from microserve.gateway.routers.mailbox import Mailbox
from microserve.gateway.state import GatewayState
from microserve.gateway.text.choice import Sequence, TokenText
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol import log
from microserve.protocol.errors import InternalError, MeshError

R = TypeVar("R", bound=GenerationRequest)
_logger = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Dialect(Generic[R]):
    """One of the two kinds of completion."""

    request: type[R]
    prompts: Callable[[R, ModelTokenizer, ModelLimits], Awaitable[list[list[int]]]]
    format: type[AnswerFormat]


class Generation(Generic[R]):
    """One HTTP request; ``run`` once."""

    def __init__(self, state: GatewayState, exchange: Exchange, dialect: Dialect[R]) -> None:
        self._state = state
        self._exchange = exchange
        self._dialect = dialect
        self._group = SequenceGroup(state, exchange)
        self._n = 1
        self._stream = False

    async def run(self) -> None:
        """Answer the request. Every error becomes an answer; only cancellation passes through."""
        failure: MeshError | None = InternalError("cut off while the gateway stopped")
        group = self._group
        try:
            failure = await self._answered()
            group.stamp_end()
            await group.settle()
        finally:
            group.release()
            group.stamp_end()
            account(
                self._state,
                self._exchange,
                group.sequences,
                group.times,
                stream=self._stream,
                failure=failure,
            )

    async def _answered(self) -> MeshError | None:
        """The error that the request ended with; the client has been told."""
        try:
            await self._answer()
        except MeshError as error:
            failure = error
        except Exception:
            _logger.exception(log.SERVICE_FAILED, http_request_id=self._exchange.request_id)
            failure = InternalError("internal error; the gateway's log has it under this request's id")
        else:
            return None
        finally:
            # At once, before anything is awaited: every step that an engine takes from here on is wasted.
            self._group.inbox.cancel()
        await self._exchange.refuse(failure)
        return failure

    async def _answer(self) -> None:
        state, exchange = self._state, self._exchange
        ttl_s = timeout_of(exchange, state.request_timeout_s)
        strategy = strategy_of(exchange)
        body = await exchange.read_body(state.bodies)
        async with exchange.watch(self._group.inbox.fail):
            with state.bodies.hold(len(body)):
                answer, include_usage = await self._submit(body, ttl_s, strategy)
            del body  # a long prompt must not stay for as long as its answer takes
            if self._stream:
                await self._stream_answer(answer, include_usage)
            else:
                await self._collect_answer(answer)

    async def _submit(self, body: bytes, ttl_s: float, strategy: str | None) -> tuple[AnswerFormat, bool]:
        """Send the sequences on their way; the answer's format, and whether a stream ends with the usage."""
        state, group = self._state, self._group
        request = parse(body, self._dialect.request)
        state.check_model(request.model)
        options = options_of(request, state.max_n)
        self._n, self._stream = options.n, options.stream
        limits = state.routers.limits
        group.times.tokenising = monotonic()
        prompts = await self._dialect.prompts(request, state.tokenizer, limits)
        sampling = sampling_of(request, limits, max(map(len, prompts)))
        group.submit(prompts, sampling, options, ttl_s=ttl_s, strategy=strategy)
        answer = self._dialect.format(
            unique_id=self._exchange.unique_id,
            created=int(time()),
            model=state.model,
            fingerprint=f"microserve-{state.version}",
            include_usage=options.include_usage,
            with_logprobs=sampling.logprobs is not None,
        )
        return answer, options.include_usage

    async def _collect_answer(self, answer: AnswerFormat) -> None:
        group = self._group
        texts: list[list[str]] = [[] for _ in group.sequences]
        tokens: list[list[TokenText]] = [[] for _ in group.sequences]
        while not group.over:
            for mailbox in await group.inbox.wait():
                sequence, piece = group.take(mailbox)
                texts[sequence.index].append(piece.text)
                tokens[sequence.index] += piece.tokens
            group.raise_failure()
        await group.settle()
        choices = [
            Choice(sequence.index, "".join(texts[sequence.index]), tokens[sequence.index], reason)
            for sequence in group.sequences
            if (reason := sequence.finish_reason) is not None
        ]
        body = answer.reply(choices, usage_of(group.sequences, self._n))
        await self._exchange.reply(200, body, self._mesh_headers())

    def _mesh_headers(self) -> dict[str, str]:
        """Who served it: known once it is over, so only where the head comes last."""
        ended = self._group.sequences[0].ended
        if ended is None:
            return {}
        return {
            "x-microserve-strategy": ended.strategy,
            "x-microserve-strategy-version": str(ended.strategy_version),
            "x-microserve-engines": ",".join(ended.engines),
        }

    async def _stream_answer(self, answer: AnswerFormat, include_usage: bool) -> None:
        group, inbox = self._group, self._group.inbox
        stream = EventStream(self._exchange, on_idle=inbox.poke, on_stall=inbox.fail)
        async with stream:
            try:
                while not group.over:
                    ready = await inbox.wait()
                    if not ready:
                        await stream.ping()
                        continue
                    await self._stream_ready(answer, stream, ready)
                    group.raise_failure()
                tail = DONE
                if include_usage:
                    await group.settle()
                    tail = answer.usage(usage_of(group.sequences, self._n)) + DONE
                await stream.close(tail)
            except MeshError as error:
                if self._exchange.started and not isinstance(error, ClientGone):
                    inbox.cancel()
                    # No [DONE]: that is how a client tells a broken stream from a whole one.
                    await stream.close(event(problem_of(error).envelope()))
                raise

    async def _stream_ready(self, answer: AnswerFormat, stream: EventStream, ready: list[Mailbox]) -> None:
        """Write everything that has come in one piece."""
        events: list[bytes] = []
        finished: list[Sequence] = []
        for mailbox in ready:
            sequence, piece = self._group.take(mailbox)
            if not piece:
                continue
            if not sequence.opened:
                sequence.opened = True
                events.append(answer.opening(sequence.index))
            if piece.text or piece.tokens:
                events.append(answer.delta(sequence.index, piece))
            if piece.finish_reason is not None:
                events.append(answer.finish(sequence.index, piece.finish_reason))
                finished.append(sequence)
        if events:
            await stream.write(b"".join(events))
        for sequence in finished:
            sequence.times.ended = monotonic()
