"""The actions of WIRE.md 4.1 as requests to vLLM. Sans-I/O and quick, as our own engine's (core/actions.py).

What vLLM has to be asked for is answered through the outbox: blocks for a grant, whether it takes a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import (
    Draining,
    InvalidInterval,
    InvalidRequest,
    MeshError,
    QueueFull,
    UnknownRequest,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.interval import bound
from microserve.services.engine.core.actions import MAX_TTL_S, MOVE_S
from microserve.services.engine.core.checks import (
    check_adapter,
    check_builds_on,
    check_first,
    check_fits,
    check_request,
    check_same_adapter,
    check_same_kv,
    check_sampling,
    check_ttl,
    generate_bounds,
    send_bounds,
)
from microserve.services.engine.core.request.record import CommitJob
from microserve.services.engine.vllm.front.receives import Receives
from microserve.services.engine.vllm.front.running import Running, RunningRecord, Transfer
from microserve.services.engine.vllm.front.sampling import first_of, probe_of, sampling_of
from microserve.services.engine.vllm.front.state import VllmState
from microserve.services.engine.vllm.link import Freed, Generate, Receive, Send


class VllmActions:
    """Turns messages of routers into changes of :class:`VllmState`."""

    def __init__(self, state: VllmState, receives: Receives, layout: KvLayout, *, max_num_seqs: int) -> None:
        self._state = state
        self._receives = receives
        self._layout = layout
        self._max_live = max_num_seqs + state.limits.max_waiting
        self._num_sends = 0
        self._sends: dict[int, Running] = {}
        receives.on_first = self._take_first

    def send_of(self, send_id: int) -> Running | None:
        """The request of a send that is not over."""
        running = self._sends.get(send_id)
        return None if running is None or running.is_over else running

    def forget_send(self, send_id: int) -> None:
        self._sends.pop(send_id, None)

    def refused(self, running: Running, error: MeshError, now: float) -> None:
        """vLLM has not taken it. The connector never hears of it, and will not say that it is over."""
        self._state.fail(running, error, now)
        if isinstance(running.ask, Receive):
            self._receives.freed(Freed(running.ask.id), now)
        elif isinstance(running.ask, Send):
            self.forget_send(running.ask.id)

    # --- the actions ---------------------------------------------------------------------------------

    def prep_recv(
        self, owner: bytes, message: wire.PrepRecv, token_ids: list[int] | None, now: float
    ) -> wire.Granted | None:
        with self._record(owner, message, token_ids, now) as record:
            end = bound("end", message.end, len(record.token_ids))
            received, asked = record.received, record.asked
            known = received.grant.end if received else asked.num_prompt_tokens if asked else end
            if known != end:
                raise InvalidInterval(
                    f"request has a grant up to {known} already, asked for {end}", field="end"
                )
            if asked is not None:
                asked.call_ids.append(message.call_id)
                return None
            if received is not None:
                return wire.Granted(message.call_id, received.grant)
            self._check_fits(end)
            if end == 0:
                received = self._receives.open_empty(record, message.salt, now)
                return wire.Granted(message.call_id, received.grant)
            try:
                self._receives.ask(record, message.call_id, end, message.salt, now, message.traceparent)
            except MeshError:
                self._state.counters["grants_refused"] += 1
                raise
            return None

    def remote_send(
        self, owner: bytes, message: wire.RemoteSend, token_ids: list[int] | None, now: float
    ) -> wire.Sent | None:
        with self._record(owner, message, token_ids, now) as record:
            return self._remote_send(message, record, now)

    def start_generate(
        self, owner: bytes, message: wire.StartGenerate, token_ids: list[int] | None, now: float
    ) -> wire.Accepted | None:
        with self._record(owner, message, token_ids, now) as record:
            return self._start_generate(message, record, now)

    def commit(self, owner: bytes, message: wire.Commit, now: float) -> None:
        record = self._state.records.find(owner, message.request_id)
        if record is None or record.received is None or record.received.grant_id != message.grant_id:
            raise UnknownRequest(f"no open grant {message.grant_id!r}", field="grant_id")
        if record.commit is not None:
            raise InvalidRequest("a commit of this grant is under way", field="grant_id")
        check_ttl(message.ttl_s)
        record.last_used = now
        job = CommitJob(message.call_id, now + min(message.ttl_s, MAX_TTL_S))
        self._receives.commit(record, record.received, job, message.numerics)

    def release(self, owner: bytes, message: wire.Release, now: float) -> wire.Done:
        record = self._state.records.find(owner, message.request_id)
        received = record.received if record else None
        if record and received and received.grant_id == message.grant_id:
            self._receives.close_received(record, now)
        return wire.Done(message.call_id)

    def abort(self, owner: bytes, message: wire.Abort, now: float) -> wire.Done:
        state, key = self._state, (owner, message.request_id)
        record = state.records.find(*key)
        state.awaited.pop(key, None)
        if record is not None:
            running = record.generate
            has_begun = running is not None and running.first_token_at is not None
            if state.draining and not record.aborted and has_begun:
                state.awaited[key] = now + MOVE_S
            state.abort(record, now)
        return wire.Done(message.call_id)

    # --- inside --------------------------------------------------------------------------------------

    @contextmanager
    def _record(
        self,
        owner: bytes,
        message: wire.PrepRecv | wire.RemoteSend | wire.StartGenerate,
        token_ids: list[int] | None,
        now: float,
    ) -> Iterator[RunningRecord]:
        """The record of an action; refused work leaves none behind."""
        state, request_id = self._state, message.request_id
        known = state.records.find(owner, request_id)
        is_unknown = known is None or known.aborted or known.is_idle
        # Sends are how contexts leave an engine that drains.
        if state.draining and is_unknown and not isinstance(message, wire.RemoteSend):
            raise Draining("this engine takes no new work", retry_after_s=1.0)
        check_adapter(message.adapter, state.limits)
        check_request(request_id, token_ids, message.ttl_s, state.limits)
        record = state.records.open(owner, request_id, token_ids, now, message.adapter)
        state.awaited.pop((owner, request_id), None)
        try:
            yield record
        except MeshError:
            if record.is_idle:
                state.records.drop(record)
            raise

    def _remote_send(self, message: wire.RemoteSend, record: RunningRecord, now: float) -> wire.Sent | None:
        grant = message.grant
        num_tokens = len(record.token_ids)
        begin, end = send_bounds(message, num_tokens)
        check_same_kv(self._layout, grant)
        check_same_adapter(record.adapter, self._state.limits, grant)
        key = (grant.grant_id, message.lane)
        if key in record.sent:
            return msgspec.structs.replace(record.sent[key], call_id=message.call_id)
        if key in record.sends:
            raise InvalidRequest(f"lane {message.lane} of {grant.grant_id} is in use", field="lane")
        check_first(message, end, num_tokens, self._state.limits)
        first = max(begin, grant.matched)
        if first >= end and message.sampling is None:
            return wire.Sent(message.call_id, message.request_id, 0, 0, 0, 0, wire.Timings())
        if first >= end:
            raise InvalidInterval("there is nothing to send: let the receiver sample", field="begin")
        self._check_whole_blocks(first, end, grant.end)
        self._check_fits(end)
        self._check_queue()
        sampling = probe_of()
        if message.sampling is not None:
            sampling = first_of(
                message.sampling,
                self._state.limits.eos_token_ids,
                num_output_tokens=message.num_output_tokens,
            )
        self._num_sends += 1
        ask = Send(
            self._num_sends,
            begin,
            end,
            message.lane,
            msgspec.msgpack.encode(grant),
            leave_first=message.sampling is not None,
            output=message.num_output_tokens if message.sampling is not None else 0,
        )
        running = Running(
            owner=record.owner,
            request_id=record.request_id,
            call_ids=[message.call_id],
            token_ids=record.token_ids[:end],
            num_prompt_tokens=end,
            params=message.sampling,
            sampling=sampling,
            salt=message.salt,
            arrived_at=now,
            deadline=now + min(message.ttl_s, MAX_TTL_S),
            ask=ask,
            transfer=Transfer(grant, message.lane, begin, end),
            adapter=record.adapter,
            traceparent=message.traceparent,
        )
        record.sends[key] = running
        self._sends[ask.id] = running
        self._state.begin(running)
        return None

    def _start_generate(
        self, message: wire.StartGenerate, record: RunningRecord, now: float
    ) -> wire.Accepted | None:
        state, params = self._state, message.sampling
        check_sampling(params, state.limits)
        if record.generate is not None:
            if record.generate.call_ids:  # vLLM has not said yet whether it takes it
                record.generate.call_ids.append(message.call_id)
                return None
            return wire.Accepted(message.call_id)
        num_tokens = len(record.token_ids)
        begin, num_prompt = generate_bounds(message, num_tokens)
        self._check_fits(num_tokens)  # vLLM always samples a token
        received = record.received
        grant = received.grant if received is not None else None
        check_builds_on(message, begin, num_tokens, grant, commits=record.commit is not None)
        self._check_queue()
        running = Running(
            owner=record.owner,
            request_id=record.request_id,
            call_ids=[message.call_id],
            token_ids=list(record.token_ids),
            num_prompt_tokens=num_prompt,
            params=params,
            sampling=sampling_of(
                params, state.limits.eos_token_ids, num_output_tokens=message.num_output_tokens
            ),
            salt=message.salt,
            arrived_at=now,
            deadline=now + min(message.ttl_s, MAX_TTL_S),
            await_first=message.await_first,
            num_delivered=message.num_output_tokens,
            adapter=record.adapter,
            traceparent=message.traceparent,
        )
        record.generate = running
        if message.grant_id is not None and received is not None:
            self._receives.adopt(running, received, message.numerics)
        running.ask = _ask_of(running)
        if message.await_first:
            # What vLLM computes begins behind a token that is not here yet.
            running.call_ids.clear()
            state.begin(running, launches=False)
            return wire.Accepted(message.call_id)
        state.begin(running)
        return None

    def _take_first(self, running: Running, token_id: int, now: float) -> None:
        """The sender's token, which the router has, and all KV before it, are here."""
        params, limits = running.params, self._state.limits
        if params is None or running.is_over:
            return
        running.is_mixed |= running.is_foreign
        running.token_ids.append(token_id)
        running.num_delivered = len(running.token_ids) - running.num_prompt_tokens
        self._state.count_tokens(running, 1, now)
        running.first_token_at = running.last_token_at = now
        ends = limits.eos_token_ids if params.ends_by_eos() else frozenset[int]()
        if token_id in ends or token_id in params.stop_token_ids:
            self._state.finish(running, "stop", now, stop_token_id=token_id)
        elif running.num_delivered >= params.max_tokens or len(running.token_ids) >= limits.room(
            self._layout.block_size
        ):
            self._state.finish(running, "length", now)
        else:
            running.ask = _ask_of(running)
            running.sampling = sampling_of(
                params, limits.eos_token_ids, num_output_tokens=running.num_delivered
            )
            self._state.launch(running)

    def _check_whole_blocks(self, first: int, end: int, grant_end: int) -> None:
        """vLLM's blocks go whole: two sends of one grant must not meet inside of one."""
        block_size = self._layout.block_size
        if first % block_size:
            raise InvalidInterval(
                f"a send from this engine begins at a multiple of {block_size} tokens, not at {first}",
                field="begin",
            )
        if end % block_size and end != grant_end:
            raise InvalidInterval(
                f"a send from this engine ends at a multiple of {block_size} tokens or at the grant's end "
                f"{grant_end}, not at {end}",
                field="end",
            )

    def _check_fits(self, num_tokens: int) -> None:
        check_fits(num_tokens, self._state.limits.room(self._layout.block_size))

    def _check_queue(self) -> None:
        if self._state.num_requests >= self._max_live:
            waiting = self._state.limits.max_waiting
            raise QueueFull(f"{waiting} requests wait already", retry_after_s=1.0)


def _ask_of(running: Running) -> Generate | None:
    """What a generation asks of the connector, if anything."""
    has_grammar = running.params is not None and running.params.grammar is not None
    output = running.num_delivered if has_grammar else 0
    if running.receive_id is None and not output:
        return None
    return Generate(-1 if running.receive_id is None else running.receive_id, output)
