"""The engine's whole state and the ways a request can leave it.

One object, changed only under the engine's lock, by ``Actions`` (what routers ask) and ``Stepper`` (what
steps bring). Invariant: whatever holds blocks is reachable from ``records`` or is in the running step, so
dropping a router's records frees everything that the router ever caused here.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import structlog

from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, InternalError, MeshError, TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core import trace
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.coding.outgoing import Outgoing
from microserve.services.engine.core.measure.tally import Tally
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.request.account import tell_finished, tell_sent
from microserve.services.engine.core.request.record import Key, Outbox, Record, Records
from microserve.services.engine.core.request.sequence import ClaimLane, Sequence, SequenceState, Transfer
from microserve.services.engine.core.scheduler import Scheduler
from microserve.services.engine.guidance.guide import Guides

PURGE_INTERVAL_S = 1.0

MakeOutgoing = Callable[[wire.RemoteSend, int], Outgoing | None]

Clock = Callable[[], float]
"""Seconds that only grow, from any zero. An engine has one (``EngineCore.clock``)."""

_logger = structlog.get_logger()


class EngineState:
    def __init__(
        self,
        memory: KvMemory,
        scheduler: Scheduler,
        limits: Limits,
        guides: Guides | None = None,
        claim: ClaimLane = lambda transfer, on_done: None,
        on_settled: Callable[[], None] = lambda: None,
        outgoing: MakeOutgoing = lambda message, num_tokens: None,
        on_put: Callable[[Transfer], None] = lambda transfer: None,
    ) -> None:
        """``claim`` begins to take a send's lane; None where nobody waits for that. ``on_settled`` is called,
        from another thread and without the engine's lock, when a guide is made or a lane taken. ``outgoing``
        says how a send of so many tokens goes by a codec; ``on_put`` is told of one that has ended well."""
        self.guides = guides
        self._claim = claim
        self.on_settled = on_settled
        self.outgoing = outgoing
        self._on_put = on_put
        self.memory = memory
        self.scheduler = scheduler
        self.limits = limits
        self.records: Records[Sequence] = Records()
        self.outbox = Outbox()
        self.compiling: list[Sequence] = []
        """Sequences that wait for nothing but their guide."""
        self.claiming: list[Sequence] = []
        """Sends that wait for nothing but their lane."""
        self.encoding: list[Sequence] = []
        """Sends that wait for nothing but their encoder."""
        self.receiving: list[Sequence] = []
        """Accepted generating sequences whose KV is not all in."""
        self.inflight: list[Sequence] = []
        """Sequences of the step that runs now: their blocks may not be freed before it ends."""
        self.committing: list[Record] = []
        """Records with a ``Commit`` under way."""
        self.draining = False
        """No new work; contexts may still be sent away."""
        self.awaited: dict[Key, float] = {}
        """Generations aborted while draining, whose KV their routers may now want: until when they may."""
        self._purged_at = float("-inf")
        self.counters: Counter[str] = Counter()
        self.tally = Tally()
        self._ids = itertools.count(1)

    def next_sequence_id(self) -> int:
        return next(self._ids)

    def count(self, name: str, amount: int = 1) -> None:
        self.counters[name] += amount

    @property
    def num_requests(self) -> int:
        return len(self.scheduler.running) + len(self.encoding) + self.num_waiting

    @property
    def num_waiting(self) -> int:
        return sum(map(len, (self.scheduler.waiting, self.receiving, self.compiling, self.claiming)))

    @property
    def has_claimed(self) -> bool:
        """A lane that was waited for is taken, or cannot be."""
        return any(
            each.transfer and each.transfer.claim and each.transfer.claim.is_done for each in self.claiming
        )

    @property
    def may_expire_soon(self) -> bool:
        """There is a request or a grant: time alone may end it, or a lane that is let go."""
        return bool(self.num_requests or self.committing or self.memory.grants.has_any)

    @property
    def must_purge(self) -> bool:
        """Something is kept that nobody may come back for."""
        return bool(len(self.records) or self.awaited)

    def is_drained(self, now: float) -> bool:
        """Nothing runs or waits here, no grant is open or in quarantine, nothing sent is on its way, and no
        context is about to move."""
        return not (
            self.num_requests
            or self.inflight
            or self.committing
            or any(until > now for until in self.awaited.values())
            or self.memory.pool.num_quarantined
            or self.memory.is_departing
            or any(record.received is not None for record in self.records)
        )

    def check_integrity(self) -> None:
        """Sequences stand where their state says, and count no KV that they have no blocks for. O(sequences);
        raises :class:`InternalError`. The books of blocks are the memory's own to check."""
        queues = (
            (SequenceState.COMPILING, self.compiling),
            (SequenceState.CLAIMING, self.claiming),
            (SequenceState.ENCODING, self.encoding),
            (SequenceState.RECEIVING, self.receiving),
            (SequenceState.WAITING, self.scheduler.waiting),
            (SequenceState.RUNNING, self.scheduler.running),
        )
        for state, queue in queues:
            for sequence in queue:
                name = f"{sequence.request_id} ({sequence.sequence_id})"
                if sequence.state is not state:
                    raise InternalError(f"{name} is {sequence.state.value} among the {state.value}")
                if sequence.num_computed > len(sequence.blocks) * self.memory.block_size:
                    raise InternalError(f"{name} has {sequence.num_computed} tokens in too few blocks")
                if not sequence.is_scored and sequence.num_computed >= sequence.num_scored:
                    raise InternalError(f"{name} has KV of tokens whose log-probabilities are missing")
                is_guided = sequence.params is not None and sequence.params.grammar is not None
                if is_guided and self.guides is not None and not (sequence.guide or sequence.guiding):
                    raise InternalError(f"{name} has a grammar and no guide")
                if state is SequenceState.COMPILING and (sequence.blocks or sequence.guiding is None):
                    raise InternalError(f"{name} waits for a guide that is not in the making")
                is_claiming = sequence.transfer is not None and sequence.transfer.claim is not None
                if (state is SequenceState.CLAIMING) is not is_claiming or (is_claiming and sequence.blocks):
                    raise InternalError(f"{name} is {state.value}, and its lane is {is_claiming=}")
                if state is SequenceState.RECEIVING and (sequence.num_computed or not sequence.received):
                    raise InternalError(f"{name} receives, and counts {sequence.num_computed} tokens already")

    def let_wait(self, sequence: Sequence) -> None:
        """For its lane, where that is behind a network; else for its turn."""
        transfer = sequence.transfer
        if transfer is not None:
            transfer.claim = self._claim(transfer, self.on_settled)
            if transfer.claim is not None:
                sequence.state = SequenceState.CLAIMING
                self.claiming.append(sequence)
                return
        self.scheduler.add(sequence)

    # --- endings -----------------------------------------------------------------------------------

    def finish(
        self,
        sequence: Sequence,
        reason: str,
        now: float,
        *,
        error: MeshError | None = None,
        stop_token_id: int | None = None,
        new_tokens: int = 0,
    ) -> None:
        """End a sequence: answer its router, free its blocks. Not while a step has it in hand."""
        self.scheduler.remove(sequence)
        for queue in (self.receiving, self.compiling, self.claiming, self.encoding):
            if sequence in queue:
                queue.remove(sequence)
        if sequence.guiding is not None:
            sequence.guiding.cancel()
        sequence.state = SequenceState.FINISHED
        record = self.records.find(sequence.owner, sequence.request_id)
        if record is not None and not record.holds(sequence):
            record = None  # aborted in its last step, and the id belongs to a newer record by now
        if sequence.transfer is not None:
            self._end_send(sequence, record, now, error, reason)
        else:
            self._end_generate(sequence, record, reason, now, error, stop_token_id, new_tokens)
        self.memory.release(sequence, now)
        if record is not None and record.is_idle:
            record.last_used = now
            if record.aborted or sequence.transfer is None:
                self.records.drop(record)

    def _end_generate(
        self,
        sequence: Sequence,
        record: Record | None,
        reason: str,
        now: float,
        error: MeshError | None,
        stop_token_id: int | None,
        new_tokens: int,
    ) -> None:
        finished = tell_finished(sequence, reason, now, self.memory.numerics, error, stop_token_id)
        if reason != "abort":  # who aborts listens no more, and the id may have been taken up again
            self.emit(sequence, new_tokens, finished)
        self.count(f"generate_{reason}")
        self.tally.ended(finished, sequence.params.max_tokens if sequence.params is not None else 0)
        self.count("generate_mixed", sequence.is_mixed)
        if record is not None and record.generate is sequence:
            record.generate = None

    def emit(self, sequence: Sequence, new_tokens: int, finished: wire.Finished | None) -> None:
        """Hand the newest ``new_tokens`` output tokens to the router, and what is known of its prompt."""
        tokens = sequence.token_ids[sequence.num_tokens - new_tokens :] if new_tokens else []
        delta = wire.Delta(
            sequence.request_id,
            sequence.num_output_tokens - new_tokens,
            tokens,
            sequence.logprobs,
            finished,
            sequence.scored,
        )
        sequence.logprobs, sequence.scored = [], None
        sequence.num_delivered = sequence.num_output_tokens
        self.outbox.deltas.append((sequence.owner, delta))

    def _end_send(
        self, sequence: Sequence, record: Record | None, now: float, error: MeshError | None, reason: str
    ) -> None:
        transfer = sequence.transfer
        if transfer is None:
            return
        failure = error or transfer.error
        if failure is None and reason != "stop":
            failure = TransferFailed(f"the send ended: {reason}")
        if record is not None:
            record.sends.pop((transfer.grant.grant_id, transfer.lane), None)
        if transfer.claim is not None:
            transfer.claim.cancel()
            transfer.claim = None
        if transfer.outgoing is not None:
            transfer.outgoing.cancel()
        if transfer.writer is not None:
            if failure is None:
                transfer.writer.finish()
            else:
                transfer.writer.fail()
        if failure is not None:
            self.count("sends_failed")
            self.tally.sends_failed[failure.code] += 1
            _logger.warning(
                log.KV_SEND_FAILED, request_id=sequence.request_id, code=failure.code, detail=failure.detail
            )
            self.outbox.replies.append((sequence.owner, failed(sequence.call_id, failure)))
            trace.send_failed(sequence.traceparent, sequence.request_id, now - sequence.arrived_at, failure)
            return
        self._on_put(transfer)
        sent = tell_sent(sequence, transfer, now, self.memory.numerics)
        if record is not None:
            record.sent[(transfer.grant.grant_id, transfer.lane)] = sent
        self.count("sends_done")
        self.tally.sent(sent)
        self.count("sent_bytes", transfer.nbytes)
        self.outbox.replies.append((sequence.owner, sent))

    def doom(self, sequence: Sequence, reason: str, now: float, error: MeshError | None = None) -> None:
        """End it now, or at the end of the running step if that has it in hand."""
        if sequence in self.inflight:
            if sequence.doomed is None:
                sequence.doomed, sequence.doom_error = reason, error
            return
        self.finish(sequence, reason, now, error=error)

    def close_received(self, record: Record, now: float) -> None:
        """Close the record's open grant and whatever waits for it."""
        if record.received is None:
            return
        self.memory.close_grant(record.received, now)
        self.fail_commit(record, TransferFailed("the grant was closed"))

    def fail_commit(self, record: Record, error: MeshError) -> None:
        if record.commit is not None:
            self.outbox.replies.append((record.owner, failed(record.commit.call_id, error)))
            record.commit = None
            self.committing.remove(record)

    def abort(self, record: Record, now: float) -> None:
        """End everything under a record."""
        self.count("aborts")
        self.close_received(record, now)
        for sequence in list(record.sends.values()):
            self.doom(sequence, "abort", now)
        if record.generate is not None:
            self.doom(record.generate, "abort", now)
        record.aborted = True
        # Whoever aborts listens no more, and a new life of the id must not be given the old one's tokens.
        key = (record.owner, record.request_id)
        self.outbox.deltas = [(o, d) for o, d in self.outbox.deltas if (o, d.request_id) != key]
        if record.is_idle:
            self.records.drop(record)

    def drop_owner(self, owner: bytes, now: float) -> int:
        """The router is lost: end all of its requests. The number that were open."""
        records = self.records.of(owner)
        for record in records:
            self.abort(record, now)
        return len(records)

    def expire(self, now: float) -> None:
        """End what has passed its deadline."""
        waiting = self.receiving, self.compiling, self.claiming, self.encoding
        queues = (self.scheduler.waiting, self.scheduler.running, *waiting)
        for sequence in [s for queue in queues for s in queue if s.deadline <= now]:
            self.doom(
                sequence, "error", now, DeadlineExceeded("the request's time was used up on this engine")
            )
        for record in list(self.committing):
            if record.commit is not None and record.commit.deadline <= now:
                self.fail_commit(record, DeadlineExceeded("the KV to commit did not arrive in time"))
                self.close_received(record, now)
        if now - self._purged_at > PURGE_INTERVAL_S:
            self._purged_at = now
            self.records.purge(now)
            self.awaited = {key: until for key, until in self.awaited.items() if until > now}


def failed(call_id: int, error: MeshError) -> wire.Failed:
    """The wire form of an error."""
    return wire.Failed(call_id, error.code, error.detail, error.field, error.retry_after_s)
