"""The core that the shell asks (services/engine/shell/door.py), with another's ``vllm serve`` behind it.

    shell ── StartGenerate ──> VllmState ── launch ──> a task for each request ── outputs ──> outbox
             other actions: UnsupportedAction          HTTP (served.py)

State and endings are the vLLM front's own (../front/state.py). There is no KV here: no grant, no cache, no
event. A server that does not answer ends this engine, whose supervisor starts it anew.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NoReturn

import structlog

from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import Draining, EngineLost, MeshError, QueueFull, UnsupportedAction
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.kv_events import BlockStored, KVEvent
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.readings import Readings
from microserve.services.engine.core.actions import MAX_TTL_S
from microserve.services.engine.core.checks import (
    Limits,
    check_adapter,
    check_builds_on,
    check_fits,
    check_request,
    check_sampling,
    generate_bounds,
)
from microserve.services.engine.core.levels import read_adapters, read_shares
from microserve.services.engine.core.request.record import Outbox
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.vllm.front.asyncllm import Llm, Stream
from microserve.services.engine.vllm.front.levels import read_oldest, read_prefixes
from microserve.services.engine.vllm.front.rates import Occupancy
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.front.sampling import sampling_of
from microserve.services.engine.vllm.front.state import VllmState

_logger = structlog.get_logger()


class ServedActions:
    """``StartGenerate`` without a grant, ``Abort``, ``Release``; the rest needs KV."""

    def __init__(self, state: VllmState, layout: KvLayout, *, max_num_seqs: int) -> None:
        self._state = state
        self._room = state.limits.room(layout.block_size)
        self._max_live = max_num_seqs + state.limits.max_waiting

    def start_generate(
        self, owner: bytes, message: wire.StartGenerate, token_ids: list[int] | None, now: float
    ) -> wire.Accepted | None:
        state, params, request_id = self._state, message.sampling, message.request_id
        known = state.records.find(owner, request_id)
        if state.draining and (known is None or known.aborted or known.is_idle):
            raise Draining("this engine takes no new work", retry_after_s=1.0)
        check_adapter(message.adapter, state.limits)
        check_request(request_id, token_ids, message.ttl_s, state.limits)
        record = state.records.open(owner, request_id, token_ids, now)
        try:
            check_sampling(params, state.limits)
            if record.generate is not None:
                if not record.generate.call_ids:
                    return wire.Accepted(message.call_id)
                record.generate.call_ids.append(message.call_id)
                return None
            if message.grant_id is not None or message.await_first:
                self._refuse("build on another engine's KV")
            num_tokens = len(record.token_ids)
            begin, num_prompt = generate_bounds(message, num_tokens)
            check_fits(num_tokens, self._room)
            check_builds_on(message, begin, num_tokens, None, commits=False)
            if params.prompt_logprobs is not None:
                self._refuse("rate the tokens of a prompt")
            if state.num_requests >= self._max_live:
                raise QueueFull(f"{state.limits.max_waiting} requests wait already", retry_after_s=1.0)
            ends = state.limits.eos_token_ids
            sampling = sampling_of(params, ends, num_output_tokens=message.num_output_tokens)
        except MeshError:
            if record.is_idle:
                state.records.drop(record)
            raise
        running = Running(
            owner=owner,
            request_id=request_id,
            call_ids=[message.call_id],
            token_ids=list(record.token_ids),
            num_prompt_tokens=num_prompt,
            params=params,
            sampling=sampling,
            salt=message.salt,
            arrived_at=now,
            deadline=now + min(message.ttl_s, MAX_TTL_S),
            num_delivered=message.num_output_tokens,
            traceparent=message.traceparent,
        )
        record.generate = running
        state.begin(running)
        return None

    def abort(self, owner: bytes, message: wire.Abort, now: float) -> wire.Done:
        record = self._state.records.find(owner, message.request_id)
        if record is not None:
            self._state.abort(record, now)
        return wire.Done(message.call_id)

    def release(self, owner: bytes, message: wire.Release, now: float) -> wire.Done:
        return wire.Done(message.call_id)

    def prep_recv(
        self, owner: bytes, message: wire.PrepRecv, token_ids: list[int] | None, now: float
    ) -> wire.Granted | None:
        self._refuse("receive KV")

    def remote_send(
        self, owner: bytes, message: wire.RemoteSend, token_ids: list[int] | None, now: float
    ) -> wire.Sent | None:
        self._refuse("send KV")

    def commit(self, owner: bytes, message: wire.Commit, now: float) -> None:
        self._refuse("receive KV")

    def _refuse(self, what: str) -> NoReturn:
        raise UnsupportedAction(f"this engine (a stock vllm serve) cannot {what}")


class ServedCore:
    def __init__(
        self,
        llm: Llm,
        layout: KvLayout,
        *,
        engine_id: str,
        incarnation: int,
        kind: EngineKind,
        numerics: Numerics,
        limits: Limits,
        max_num_seqs: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``layout``: its model and blocks; nothing lies in them here."""
        self.engine_id, self.incarnation, self.model = engine_id, incarnation, layout.model
        self.kind, self.numerics, self.kernels, self.clock = kind, numerics, "", clock
        self.layout = layout
        self.lock: AbstractContextManager[bool] = nullcontext(True)
        self.state = VllmState(limits, numerics, self._launch)
        self.actions = ServedActions(self.state, layout, max_num_seqs=max_num_seqs)
        self.progress = 0
        """Outputs, and looks at the server that found it to have gone on (:meth:`heard`)."""
        self._llm = llm
        self._max_num_seqs = max_num_seqs
        self.occupancy = Occupancy()
        self._tasks: set[asyncio.Task[None]] = set()
        self.on_output: Callable[[], None] = lambda: None
        self.on_lost: Callable[[], None] = lambda: None

    @property
    def is_busy(self) -> bool:
        return bool(self.state.live)

    @property
    def has_output(self) -> bool:
        return bool(self.state.outbox.replies or self.state.outbox.deltas)

    def wake(self) -> None:
        """Requests are tasks, which run by themselves."""

    def heard(self) -> None:
        """The server has computed something since it was last looked at."""
        self.progress += 1

    def take_output(self) -> tuple[Outbox, list[KVEvent]]:
        return self.state.outbox.take(), []

    def cached_blocks(self) -> Sequence[BlockStored]:
        return []

    def load(self) -> wire.EngineLoad:
        state, rates, now = self.state, self.state.rates, self.clock()
        self.occupancy.look(state.live, (), now)
        queued = [each for each in state.live if each.first_token_at is None]
        running = min(len(state.live), self._max_num_seqs)
        return wire.EngineLoad(
            progress=self.progress,
            num_steps=self.progress,
            num_running=running,
            num_waiting=len(state.live) - running,
            queued_prefill_tokens=sum(len(each.token_ids) for each in queued),
            free_blocks=state.limits.num_blocks,
            prefill_tokens_per_s=rates.prefill_tokens_per_s,
            decode_step_s=rates.decode_step_s,
            draining=state.draining,
            max_num_seqs=self._max_num_seqs,
            prefill_rate_age_s=rates.prefill_rate_age_s(now),
            mean_output_tokens=rates.mean_output_tokens,
            decode_share=self.occupancy.decode.at(now),
            idle_share=self.occupancy.idle.at(now),
        )

    def read(self, readings: Readings) -> None:
        """What it holds and has done, for its metrics: its server has its own, of its cache and its steps."""
        state = self.state
        read_oldest(
            readings, [each.arrived_at for each in state.live if each.first_token_at is None], self.clock()
        )
        read_prefixes(readings, state.tally)
        read_shares(readings, self.load())
        read_adapters(readings, 0, set(), set())
        state.tally.read(readings, state.counters)

    def expire(self) -> None:
        self.state.expire(self.clock())
        self.on_output()

    def close(self) -> None:
        for record in self.state.records:
            self.state.abort(record, self.clock())
        for task in self._tasks:
            task.cancel()

    # --- requests at the server ----------------------------------------------------------------------

    def _launch(self, running: Running) -> None:
        self._spawn(self._follow(running))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, running: Running) -> None:
        """From its being asked for to its last output; whatever goes wrong is this request's end alone."""
        stream: Stream | None = None
        try:
            stream = taken = await self._llm.add(running)
            running.cancel = lambda: self._spawn(taken.abort())
            if running.is_over:
                return
            self.state.accepted(running)
            self.occupancy.look(self.state.live, (), self.clock())
            self.on_output()
            while not running.is_over:
                output = await stream.next()
                self.progress += 1
                self.state.take_output(running, output, self.clock())
                self.occupancy.look(self.state.live, (), self.clock())
                self.on_output()
        except MeshError as error:
            self.state.fail(running, error, self.clock())
        except Exception as error:
            _logger.exception(log.TASK_FAILED, task="request at vllm serve")
            self.state.fail(running, EngineLost(str(error)), self.clock())
        finally:
            running.cancel = lambda: None
            if stream is not None:
                await stream.abort()
            self.on_output()
