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
    TransferFailed,
    UnknownRequest,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.geometry import difference
from microserve.protocol.messages.grant import MAX_LANES, Grant
from microserve.protocol.messages.interval import bound
from microserve.protocol.messages.sampling import SamplingParams
from microserve.protocol.types import MAX_REQUEST_ID_CHARS
from microserve.services.engine.core.record import CommitJob, Record
from microserve.services.engine.core.sequence import Sequence, SequenceState, Transfer
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
            return wire.Granted(message.call_id, record.received.grant)
        self._check_fits(end)
        try:
            received = state.memory.open_grant(
                record, owner, message.request_id, record.token_ids, end, message.salt, now
            )
        except (CacheFull, PromptTooLong):
            state.count("grants_refused")
            raise
        state.count("grants_opened")
        return wire.Granted(message.call_id, received.grant)

    def _remote_send(self, message: wire.RemoteSend, record: Record, now: float) -> wire.Sent | None:
        grant = message.grant
        num_tokens = len(record.token_ids)
        begin, end = bound("begin", message.begin, num_tokens), bound("end", message.end, num_tokens)
        if not begin <= end <= grant.end:
            raise InvalidInterval(f"[{begin}, {end}) is not inside the grant's [0, {grant.end})", field="end")
        if not 0 <= message.lane < MAX_LANES:
            raise InvalidRequest(f"lane is {message.lane}, 0 to {MAX_LANES - 1}", field="lane")
        self._check_same_kv(grant)
        key = (grant.grant_id, message.lane)
        if key in record.sent:
            return msgspec.structs.replace(record.sent[key], call_id=message.call_id)
        if key in record.sends:
            raise InvalidRequest(f"lane {message.lane} of {grant.grant_id} is in use", field="lane")
        if message.sampling is not None:
            self._check_sampling(message.sampling)
            if end != num_tokens:
                raise InvalidInterval("sampling needs end == len(prompt)", field="end")
            if message.sampling.prompt_logprobs is not None and not message.num_output_tokens:
                raise _not_alone()
            if not 0 <= message.num_output_tokens < min(num_tokens, message.sampling.max_tokens):
                raise InvalidRequest("num_output_tokens leaves no token to sample", field="num_output_tokens")
        first = max(begin, grant.matched)
        if first >= end and message.sampling is None:
            return wire.Sent(message.call_id, message.request_id, 0, 0, 0, 0, wire.Timings())
        if first >= end:
            raise InvalidInterval("there is nothing to send: let the receiver sample", field="begin")
        self._check_fits(end)
        self._check_queue()
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
        sequence.transfer = Transfer(grant, message.lane, begin, end, first)
        record.sends[key] = sequence
        self._let_wait(sequence)
        return None

    def _start_generate(self, message: wire.StartGenerate, record: Record, now: float) -> wire.Accepted:
        state = self._state
        self._check_sampling(message.sampling)
        if record.generate is not None:
            return wire.Accepted(message.call_id)
        num_tokens = len(record.token_ids)
        begin = bound("begin", message.begin, num_tokens)
        num_prompt = num_tokens - message.num_output_tokens
        if not 0 < num_prompt <= num_tokens:
            raise InvalidRequest(f"num_output_tokens must be below {num_tokens}", field="num_output_tokens")
        if message.num_output_tokens and message.num_output_tokens >= message.sampling.max_tokens:
            raise InvalidRequest("max_tokens are out already", field="num_output_tokens")
        if (
            message.sampling.prompt_logprobs is not None
            and not message.num_output_tokens
            and message.grant_id
        ):
            raise _not_alone()
        self._check_fits(num_tokens, more=min(1, message.sampling.max_tokens))
        received = record.received
        if message.grant_id is None:
            if begin != 0:
                raise InvalidInterval(f"begin must be 0 without a grant, is {begin}", field="begin")
        else:
            if received is None or received.grant_id != message.grant_id:
                raise UnknownRequest(f"no open grant {message.grant_id!r}", field="grant_id")
            if record.commit is not None:
                raise InvalidRequest("a commit of this grant is under way", field="grant_id")
            if begin != received.grant.end:
                raise InvalidInterval(
                    f"begin must be the grant's end {received.grant.end}, is {begin}", field="begin"
                )
            if message.await_first and (begin != num_tokens or received.grant.matched == begin):
                raise InvalidInterval(
                    "await_first needs a send that ends at begin == len(prompt)", field="await_first"
                )
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
        _check_ttl(message.ttl_s)
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
        if not 0 < len(request_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"request_id must have 1 to {MAX_REQUEST_ID_CHARS} characters", field="request_id"
            )
        _check_ttl(ttl_s)
        if token_ids is not None:
            limit = self._state.limits.vocab_size
            if not token_ids:
                raise InvalidRequest("the prompt is empty", field="tokens")
            if max(token_ids) >= limit:
                raise InvalidRequest(f"token id {max(token_ids)} is not below {limit}", field="tokens")
        return self._state.records.open(owner, request_id, token_ids, now)

    def _check_fits(self, num_tokens: int, *, more: int = 1) -> None:
        """Could it ever run here? ``more`` positions are needed than the tokens known."""
        limits = self._state.limits
        room = min(limits.max_model_len, limits.num_blocks * self._state.memory.block_size)
        if num_tokens + more > room:
            raise PromptTooLong(
                f"this engine's maximum context length is {room} tokens; {num_tokens} and at least {more} "
                "more were asked for",
                field="tokens",
            )

    def _check_same_kv(self, grant: Grant) -> None:
        """Before anything is computed: could the receiver read what we would put there?"""
        layout = self._state.memory.grants.layout
        different = difference(layout.geometry, grant.geometry)
        if not different and layout.layout_hash != grant.layout_hash:
            different = f"layout_hash: {layout.layout_hash} here, {grant.layout_hash} there"
        if different:
            raise TransferFailed(f"KV of engine {grant.engine_id} is another one: {different}")

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
        guiding = state.guides.prepare(params, output, state.limits.eos_token_ids, state.on_guide)
        if not guiding.is_done:  # looked at once: it may be done a moment later
            sequence.guiding = guiding
            return
        if guiding.error is not None:
            raise guiding.error
        sequence.guide = guiding.guide

    def _let_wait(self, sequence: Sequence) -> None:
        """For its guide, else for its turn."""
        if sequence.guiding is None:
            self._state.scheduler.add(sequence)
            return
        sequence.state = SequenceState.COMPILING
        self._state.compiling.append(sequence)

    def _check_sampling(self, params: SamplingParams) -> None:
        limits = self._state.limits
        params.validate(limits.vocab_size)
        if params.grammar is not None and self._state.guides is None:
            raise InvalidRequest("this engine constrains no output", field="grammar")
        forbidden = limits.eos_token_ids.union(params.stop_token_ids)
        if params.min_tokens and len(forbidden) >= limits.vocab_size:
            raise InvalidRequest("min_tokens leaves no token that may be chosen", field="min_tokens")

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


def _check_ttl(ttl_s: float) -> None:
    if not ttl_s > 0.0:
        raise InvalidRequest("ttl_s must be above 0", field="ttl_s")


def _not_alone() -> InvalidRequest:
    """Of a prefix that another engine computes there are no logits here."""
    return InvalidRequest(
        "prompt_logprobs needs an engine that computes all of the prompt", field="prompt_logprobs"
    )
