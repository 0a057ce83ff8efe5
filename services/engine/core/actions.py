"""The actions, as state changes: PrepRecv, RemoteSend, StartGenerate, Commit, Abort, Release (WIRE.md 4.1).

Sans-I/O and quick: an action never computes and never waits. It answers at once, raises a :class:`MeshError`,
or returns None and the answer follows through the outbox. Called under the engine's lock.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import msgspec

from microserve.protocol.errors import (
    CacheFull,
    Draining,
    InvalidInterval,
    InvalidRequest,
    MeshError,
    PromptTooLong,
    QueueFull,
    UnknownRequest,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.interval import bound
from microserve.protocol.messages.request.sampling import SamplingParams
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
from microserve.services.engine.core.request.record import CommitJob, Record
from microserve.services.engine.core.request.sequence import Sequence, SequenceState, Transfer
from microserve.services.engine.core.state import EngineState

MAX_TTL_S = 86_400.0
MOVE_S = 4.0
"""An engine that drains waits so long for the ``RemoteSend`` that moves what an aborted stream has computed;
longer than a router tries (failover.py there)."""


class Actions:
    """Turns messages of routers into changes of :class:`EngineState`."""

    def __init__(self, state: EngineState) -> None:
        self._state = state

    def prep_recv(
        self, owner: bytes, message: wire.PrepRecv, token_ids: list[int] | None, now: float
    ) -> wire.Granted:
        with self._record(owner, message, token_ids, now) as record:
            return self._prep_recv(owner, message, record, now)

    def remote_send(
        self, owner: bytes, message: wire.RemoteSend, token_ids: list[int] | None, now: float
    ) -> wire.Sent | None:
        with self._record(owner, message, token_ids, now) as record:
            return self._remote_send(message, record, now)

    def start_generate(
        self, owner: bytes, message: wire.StartGenerate, token_ids: list[int] | None, now: float
    ) -> wire.Accepted:
        with self._record(owner, message, token_ids, now) as record:
            return self._start_generate(message, record, now)

    @contextmanager
    def _record(
        self,
        owner: bytes,
        message: wire.PrepRecv | wire.RemoteSend | wire.StartGenerate,
        token_ids: list[int] | None,
        now: float,
    ) -> Iterator[Record]:
        """The record of an action; refused work leaves none behind."""
        check_adapter(message.adapter, self._state.limits)
        # Sends are how contexts leave an engine that drains.
        is_new_work = not isinstance(message, wire.RemoteSend)
        record = self._open(owner, message.request_id, token_ids, message.ttl_s, now, is_new_work=is_new_work)
        self._state.awaited.pop((owner, message.request_id), None)
        try:
            yield record
        except MeshError:
            self._drop_if_idle(record)
            raise

    def _prep_recv(self, owner: bytes, message: wire.PrepRecv, record: Record, now: float) -> wire.Granted:
        state = self._state
        end = bound("end", message.end, len(record.token_ids))
        if record.received is not None:
            if record.received.grant.end != end:
                raise InvalidInterval(
                    f"request has a grant up to {record.received.grant.end} already, asked for {end}",
                    field="end",
                )
            if record.received.may_lose is not message.may_lose:
                raise InvalidRequest("request has a grant with another may_lose already", field="may_lose")
            return wire.Granted(message.call_id, record.received.grant)
        self._check_fits(end)
        try:
            received = state.memory.open_grant(
                *(record, owner, message.request_id, record.token_ids, end, message.salt, now),
                may_lose=message.may_lose,
            )
        except (CacheFull, PromptTooLong):
            state.count("grants_refused")
            raise
        state.count("grants_opened")
        return wire.Granted(message.call_id, received.grant)

    def _remote_send(self, message: wire.RemoteSend, record: Record, now: float) -> wire.Sent | None:
        grant = message.grant
        num_tokens = len(record.token_ids)
        begin, end = send_bounds(message, num_tokens)
        check_same_kv(self._state.memory.grants.layout, grant)
        check_same_adapter(message.adapter, self._state.limits, grant)
        key = (grant.grant_id, message.lane)
        if key in record.sent:
            return msgspec.structs.replace(record.sent[key], call_id=message.call_id)
        if key in record.sends:
            raise InvalidRequest(f"lane {message.lane} of {grant.grant_id} is in use", field="lane")
        check_first(message, end, num_tokens, self._state.limits)
        self._check_grammar(message.sampling)
        first = max(begin, grant.matched)
        if first >= end and message.sampling is None:
            return wire.Sent(message.call_id, message.request_id, 0, 0, 0, 0, wire.Timings())
        if first >= end:
            raise InvalidInterval("there is nothing to send: let the receiver sample", field="begin")
        self._check_fits(end)
        self._check_queue()
        outgoing = self._state.outgoing(message, end - first)
        sequence = self._sequence(
            record,
            message.call_id,
            record.token_ids[:end],
            end - message.num_output_tokens if message.sampling is not None else end,
            message.sampling,
            message.ttl_s,
            message.salt,
            now,
        )
        self._guide(sequence)
        sequence.traceparent = message.traceparent
        sequence.transfer = Transfer(grant, message.lane, begin, end, first, outgoing=outgoing)
        record.sends[key] = sequence
        self._let_wait(sequence)
        return None

    def _start_generate(self, message: wire.StartGenerate, record: Record, now: float) -> wire.Accepted:
        state = self._state
        check_sampling(message.sampling, state.limits)
        self._check_grammar(message.sampling)
        if record.generate is not None:
            return wire.Accepted(message.call_id)
        num_tokens = len(record.token_ids)
        begin, num_prompt = generate_bounds(message, num_tokens)
        self._check_fits(num_tokens, more=min(1, message.sampling.max_tokens))
        received = record.received
        grant = received.grant if received is not None else None
        check_builds_on(message, begin, num_tokens, grant, commits=record.commit is not None)
        self._check_queue()
        sequence = self._sequence(
            record,
            message.call_id,
            list(record.token_ids),
            num_prompt,
            message.sampling,
            message.ttl_s,
            message.salt,
            now,
        )
        self._guide(sequence)
        sequence.traceparent = message.traceparent
        sequence.num_delivered = message.num_output_tokens
        record.generate = sequence
        if message.grant_id is None:
            self._let_wait(sequence)
        elif received is not None:
            sequence.await_first = message.await_first
            sequence.state = SequenceState.RECEIVING
            state.memory.take(received, message.numerics)
            state.memory.adopt(sequence, received)
            state.receiving.append(sequence)
        return wire.Accepted(message.call_id)

    def commit(self, owner: bytes, message: wire.Commit, now: float) -> None:
        record = self._state.records.find(owner, message.request_id)
        if record is None or record.received is None or record.received.grant_id != message.grant_id:
            raise UnknownRequest(f"no open grant {message.grant_id!r}", field="grant_id")
        if record.commit is not None:
            raise InvalidRequest("a commit of this grant is under way", field="grant_id")
        check_ttl(message.ttl_s)
        record.last_used = now
        record.commit = CommitJob(message.call_id, now + min(message.ttl_s, MAX_TTL_S))
        self._state.committing.append(record)
        self._state.memory.take(record.received, message.numerics)
        self._state.memory.grants.consume(message.grant_id)

    def release(self, owner: bytes, message: wire.Release, now: float) -> wire.Done:
        record = self._state.records.find(owner, message.request_id)
        received = record.received if record else None
        if record and received and received.grant_id == message.grant_id:
            self._state.close_received(record, now)
        return wire.Done(message.call_id)

    def abort(self, owner: bytes, message: wire.Abort, now: float) -> wire.Done:
        state, key = self._state, (owner, message.request_id)
        record = state.records.find(*key)
        state.awaited.pop(key, None)
        if record is not None:
            sequence = record.generate
            has_begun = sequence is not None and sequence.first_token_at is not None
            if state.draining and not record.aborted and has_begun:
                state.awaited[key] = now + MOVE_S
            state.abort(record, now)
        return wire.Done(message.call_id)

    # --- checks ------------------------------------------------------------------------------------

    def _open(
        self,
        owner: bytes,
        request_id: str,
        token_ids: list[int] | None,
        ttl_s: float,
        now: float,
        *,
        is_new_work: bool,
    ) -> Record:
        known = self._state.records.find(owner, request_id)
        is_unknown = known is None or known.aborted or known.is_idle
        if self._state.draining and is_new_work and is_unknown:
            raise Draining("this engine takes no new work", retry_after_s=1.0)
        check_request(request_id, token_ids, ttl_s, self._state.limits)
        return self._state.records.open(owner, request_id, token_ids, now)

    def _check_fits(self, num_tokens: int, *, more: int = 1) -> None:
        check_fits(num_tokens, self._state.limits.room(self._state.memory.block_size), more=more)

    def _check_queue(self) -> None:
        state = self._state
        if state.num_waiting >= state.limits.max_waiting:
            raise QueueFull(f"{state.limits.max_waiting} requests wait already", retry_after_s=1.0)

    def _guide(self, sequence: Sequence) -> None:
        """Begin with the guide of a sequence that wants one; raises what is known to be wrong already."""
        state, params = self._state, sequence.params
        if params is None or params.grammar is None or state.guides is None:
            return
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        guiding = state.guides.prepare(params, output, state.limits.eos_token_ids, state.on_settled)
        if not guiding.is_done:  # looked at once: it may be done a moment later
            sequence.guiding = guiding
            return
        if guiding.error is not None:
            raise guiding.error
        sequence.guide = guiding.guide

    def _let_wait(self, sequence: Sequence) -> None:
        """For its guide, else for its lane, else for its turn."""
        if sequence.guiding is None:
            self._state.let_wait(sequence)
            return
        sequence.state = SequenceState.COMPILING
        self._state.compiling.append(sequence)

    def _check_grammar(self, params: SamplingParams | None) -> None:
        if params is not None and params.grammar is not None and self._state.guides is None:
            raise InvalidRequest("this engine constrains no output", field="grammar")

    def _drop_if_idle(self, record: Record) -> None:
        if record.is_idle:
            self._state.records.drop(record)

    def _sequence(
        self,
        record: Record,
        call_id: int,
        token_ids: list[int],
        num_prompt_tokens: int,
        params: SamplingParams | None,
        ttl_s: float,
        salt: str,
        now: float,
    ) -> Sequence:
        state = self._state
        return Sequence(
            sequence_id=state.next_sequence_id(),
            owner=record.owner,
            request_id=record.request_id,
            call_id=call_id,
            token_ids=token_ids,
            num_prompt_tokens=num_prompt_tokens,
            params=params,
            deadline=now + min(ttl_s, MAX_TTL_S),
            arrived_at=now,
            ready_at=now,
            chain=state.memory.new_chain(salt),
            salt=salt,
        )
