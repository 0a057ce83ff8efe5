"""One generation request from its body to its last byte, streamed or not.

Owns the order of things: what may be refused before anything is sent, the sequences on the bus, their merging
into one answer, and the end whatever happened: cancelled on the bus, counted, one canonical line a choice.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from time import monotonic, time
from typing import Generic, TypeVar

import msgspec
import structlog

from microserve.gateway.accounting import account, usage_of
from microserve.gateway.answer import AnswerFormat, Choice
from microserve.gateway.canonical import Timeline
from microserve.gateway.errors import ClientGone, problem_of
from microserve.gateway.exchange import Exchange, strategy_of, timeout_of
from microserve.gateway.mailbox import Inbox, Mailbox
from microserve.gateway.openai_schema import GenerationRequest, parse
from microserve.gateway.sampling_request import (
    MAX_SEQUENCES,
    GenerationOptions,
    ModelLimits,
    options_of,
    sampling_of,
    seed_of,
)
from microserve.gateway.sequence import Piece, Sequence, TokenText
from microserve.gateway.sse import DONE, EventStream, event
from microserve.gateway.state import GatewayState
from microserve.gateway.tokenizer import ModelTokenizer
from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, InternalError, InvalidRequest, MeshError
from microserve.protocol.sampling import SamplingParams

DEADLINE_GRACE_S = 2.0
"""The router ends a request at its deadline; only if it does not, we do."""
SETTLE_S = 0.5
"""Longest wait for the router's account of a sequence that was cancelled."""

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
        self._loop = asyncio.get_running_loop()
        self._inbox = Inbox()
        self._times = Timeline(exchange.arrived)
        self._n = 1
        self._stream = False
        self._sequences: list[Sequence] = []
        self._num_reserved = 0
        self._deadline: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Answer the request. Every error becomes an answer; only cancellation passes through."""
        failure: MeshError | None = InternalError("cut off while the gateway stopped")
        try:
            failure = await self._answered()
            self._stamp_end()
            await self._inbox.settle(SETTLE_S)
        finally:
            self._close(failure)

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
            self._inbox.cancel()
        await self._exchange.refuse(failure)
        return failure

    async def _answer(self) -> None:
        state, exchange = self._state, self._exchange
        state.check_open()
        ttl_s = timeout_of(exchange, state.request_timeout_s)
        strategy = strategy_of(exchange)
        body = await exchange.read_body(state.bodies)
        async with exchange.watch(self._inbox.fail):
            request = parse(body, self._dialect.request)
            state.check_model(request.model)
            options = options_of(request, state.max_n)
            self._n, self._stream = options.n, options.stream
            limits = state.routers.choose().limits
            self._times.tokenising = monotonic()
            prompts = await self._dialect.prompts(request, state.tokenizer, limits)
            sampling = sampling_of(request, limits, max(map(len, prompts)))
            self._submit(prompts, sampling, options, ttl_s, strategy)
            answer = self._dialect.format(
                unique_id=exchange.unique_id,
                created=int(time()),
                model=state.model,
                fingerprint=f"microserve-{state.version}",
                include_usage=options.include_usage,
                with_logprobs=sampling.logprobs is not None,
            )
            if options.stream:
                await self._stream_answer(answer, options.include_usage)
            else:
                await self._collect_answer(answer)

    def _submit(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams,
        options: GenerationOptions,
        ttl_s: float,
        strategy: str | None,
    ) -> None:
        """Send every sequence to one router: choices of one prompt share its prefix."""
        state, exchange, inbox = self._state, self._exchange, self._inbox
        count = len(prompts) * options.n
        if count > MAX_SEQUENCES:
            raise InvalidRequest(f"prompts times n must be at most {MAX_SEQUENCES}", field="n")
        if inbox.error is not None:  # the client went while its prompt was tokenised
            raise inbox.error
        now = monotonic()
        remaining_s = exchange.arrived + ttl_s - now
        if remaining_s <= 0.0:
            raise DeadlineExceeded(f"{ttl_s:.3f} s were over before the request was sent")
        link = state.routers.choose()
        state.reserve(count)
        self._num_reserved = count
        self._times.submitted = now
        self._deadline = self._loop.call_later(
            remaining_s + DEADLINE_GRACE_S,
            inbox.fail,
            DeadlineExceeded(f"the request took longer than {ttl_s:.3f} s"),
        )
        for index in range(count):
            sequence = Sequence(
                state.tokenizer,
                index=index,
                prompt_ids=prompts[index // options.n],
                sampling=sampling,
                stop=options.stop,
                times=dataclasses.replace(self._times),
            )
            self._sequences.append(sequence)
            sequence.mailbox = state.routers.generate(
                inbox,
                link,
                request_id=f"{exchange.unique_id}-{index}",
                index=index,
                tokens=sequence.prompt_ids,
                sampling=msgspec.structs.replace(sampling, seed=seed_of(sampling.seed, index)),
                ttl_s=remaining_s,
                strategy=strategy,
                salt=options.salt,
            )
            state.metrics.submitted(len(sequence.prompt_ids))

    def _take(self, mailbox: Mailbox) -> tuple[Sequence, Piece]:
        """What has come for one sequence; its ``error`` is set if it failed."""
        sequence = self._sequences[mailbox.index]
        batch = mailbox.take()
        if batch.token_ids and not sequence.over:
            times, now = sequence.times, monotonic()
            if times.first_token is None:
                times.first_token = mailbox.first_at
                self._state.metrics.first_token(now - times.arrived)
            else:
                self._state.metrics.next_tokens(now - sequence.last_tokens_at, len(batch.token_ids))
            sequence.last_tokens_at = now
        piece = sequence.push(batch)
        if sequence.finish_reason is not None:
            mailbox.cancel()  # a stop string ended it; the engine does not know yet
        elif sequence.error is None:
            sequence.error = mailbox.failed
        return sequence, piece

    def _raise_failure(self) -> None:
        """One failed choice fails the request: half an answer would look like a whole one."""
        for sequence in self._sequences:
            if sequence.error is not None:
                raise sequence.error

    async def _collect_answer(self, answer: AnswerFormat) -> None:
        texts: list[list[str]] = [[] for _ in self._sequences]
        tokens: list[list[TokenText]] = [[] for _ in self._sequences]
        while not all(sequence.over for sequence in self._sequences):
            for mailbox in await self._inbox.wait():
                sequence, piece = self._take(mailbox)
                texts[sequence.index].append(piece.text)
                tokens[sequence.index] += piece.tokens
            self._raise_failure()
        await self._inbox.settle(SETTLE_S)
        choices = [
            Choice(sequence.index, "".join(texts[sequence.index]), tokens[sequence.index], reason)
            for sequence in self._sequences
            if (reason := sequence.finish_reason) is not None
        ]
        body = answer.reply(choices, usage_of(self._sequences, self._n))
        await self._exchange.reply(200, body, self._mesh_headers())

    def _mesh_headers(self) -> dict[str, str]:
        """Who served it: known once it is over, so only where the head comes last."""
        ended = self._sequences[0].ended
        if ended is None:
            return {}
        return {"x-microserve-strategy": ended.strategy, "x-microserve-engines": ",".join(ended.engines)}

    async def _stream_answer(self, answer: AnswerFormat, include_usage: bool) -> None:
        inbox = self._inbox
        stream = EventStream(self._exchange, on_idle=inbox.poke, on_stall=inbox.fail)
        async with stream:
            try:
                while not all(sequence.over for sequence in self._sequences):
                    ready = await inbox.wait()
                    if not ready:
                        await stream.ping()
                        continue
                    await self._stream_ready(answer, stream, ready)
                    self._raise_failure()
                tail = DONE
                if include_usage:
                    await inbox.settle(SETTLE_S)
                    tail = answer.usage(usage_of(self._sequences, self._n)) + DONE
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
            sequence, piece = self._take(mailbox)
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

    def _stamp_end(self) -> None:
        now = monotonic()
        for times in (self._times, *(sequence.times for sequence in self._sequences)):
            if times.ended is None:
                times.ended = now

    def _close(self, failure: MeshError | None) -> None:
        self._inbox.cancel()
        if self._deadline is not None:
            self._deadline.cancel()
        for mailbox in self._inbox.mailboxes:
            self._state.routers.forget(mailbox)
        self._state.num_sequences -= self._num_reserved
        self._stamp_end()
        account(
            self._state,
            self._exchange,
            self._sequences,
            self._times,
            stream=self._stream,
            failure=failure,
        )
