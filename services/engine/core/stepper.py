"""What a step takes in and what it brings: arrivals before it, sampled tokens and sent layers after it.

Sans-I/O, under the engine's lock. ``next_step`` -> (it is executed without the lock) -> ``complete`` or
``fail``. Exactly one step is out at a time.
"""

from __future__ import annotations

import structlog

from microserve.kvcache.grant.table import Discharged, Expired, Settled
from microserve.protocol import log
from microserve.protocol.errors import InternalError, InvalidRequest, MeshError, TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.batch import Sampled, StepResult
from microserve.services.engine.core.measure.rates import Rates
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.request.record import CommitJob, Record, RecordOf
from microserve.services.engine.core.request.sequence import Sequence, SequenceState, is_put
from microserve.services.engine.core.scheduler import Step
from microserve.services.engine.core.state import EngineState

_logger = structlog.get_logger()

PROBE_INTERVAL_S = 0.02
"""How often the writers of one grant are probed for failure and death."""


class Stepper:
    def __init__(self, state: EngineState, num_layers: int) -> None:
        self._state = state
        self._num_layers = num_layers
        self.num_steps = 0
        self.rates = Rates()

    # --- before a step -----------------------------------------------------------------------------

    def next_step(self, now: float) -> Step | None:
        """Take in what has arrived and choose the next step; None when nothing can run now."""
        state = self._state
        self.rates.goes_on(now)
        self.take_guides(now)
        self.take_claims(now)
        self.take_encoded(now)
        self.take_arrivals(now)
        state.expire(now)
        step = state.scheduler.schedule(now) or self._early_step(now)
        if step is None:
            self.rates.rests(now, awaits_kv=bool(state.receiving or state.committing))
            return None
        sending = [share.sequence for share in step.sends if share.sequence not in step.sequences]
        state.inflight = [*step.sequences, *sending]
        return step

    def take_guides(self, now: float) -> None:
        """Let sequences on whose guide is made, and end those whose grammar is none, or takes too long."""
        state = self._state
        for sequence in [*state.compiling, *state.receiving]:
            guiding = sequence.guiding
            if guiding is None:
                continue
            is_done = guiding.is_done  # looked at once: it may be done a moment later
            if is_done and guiding.guide is not None:
                sequence.guide, sequence.guiding = guiding.guide, None
                if sequence.state is SequenceState.COMPILING:
                    state.compiling.remove(sequence)
                    state.let_wait(sequence)
            elif is_done or guiding.is_overdue(now):
                late = InvalidRequest("the grammar takes too long to compile", field="grammar")
                state.count("grammars_refused")
                state.finish(sequence, "error", now, error=guiding.error or late)

    def take_claims(self, now: float) -> None:
        """Let sends on whose lane is taken, and end those whose lane cannot be, or whose grant was closed
        while they wait for their turn: until then its blocks are kept for them."""
        state = self._state
        for sequence in list(state.claiming):
            transfer = sequence.transfer
            if transfer is None or transfer.claim is None or not transfer.claim.is_done:
                continue
            claim, transfer.claim = transfer.claim, None
            try:
                claim.take_into(transfer)
            except MeshError as error:
                state.finish(sequence, "error", now, error=error)
                continue
            state.claiming.remove(sequence)
            state.scheduler.add(sequence)
        for sequence in list(state.scheduler.waiting):
            transfer = sequence.transfer
            if (
                transfer is None
                or transfer.writer is None
                or transfer.peer is None
                or not transfer.peer.is_far
            ):
                continue
            try:
                transfer.writer.require_grant_open()
            except MeshError as error:
                state.finish(sequence, "error", now, error=error)

    def take_encoded(self, now: float) -> None:
        """Put what is encoded, and end sends of which everything is."""
        state = self._state
        for sequence in [*state.scheduler.running, *state.encoding]:
            transfer = sequence.transfer
            if transfer is None or transfer.outgoing is None or transfer.writer is None:
                continue
            if transfer.error is None and transfer.outgoing.is_ready:
                try:
                    transfer.nbytes += transfer.outgoing.put_ready(transfer.writer)
                except MeshError as error:
                    transfer.error = error
            if sequence.state is SequenceState.ENCODING and (transfer.error is not None or is_put(transfer)):
                is_whole = transfer.error is None
                state.finish(sequence, "stop" if is_whole else "error", now, error=transfer.error)

    def take_arrivals(self, now: float) -> None:
        """Move received KV on: to running sequences, to commits, to the end of quarantine."""
        state = self._state
        for event in state.memory.poll(now):
            match event:
                case Expired():
                    _logger.warning(log.GRANT_EXPIRED, grant_id=event.grant_id, request_id=event.request_id)
                    state.count("grants_expired")
                case Discharged():
                    _logger.info(
                        log.GRANT_DISCHARGED,
                        grant_id=event.grant_id,
                        request_id=event.request_id,
                        blocks=event.num_blocks,
                    )
                case Settled():
                    self._settle(state.memory.received.get(event.grant_id))
        for sequence in list(state.receiving):
            if sequence.received is not None and sequence.guiding is None:
                self._take_arrival(sequence, sequence.received, now)
        for record in list(state.committing):
            if record.commit is not None and record.commit.sealed_blocks is None:
                self._take_commit(record, record.commit, now)

    def _take_arrival(self, sequence: Sequence, received: ReceivedGrant, now: float) -> None:
        state, grants, grant_id = self._state, self._state.memory.grants, received.grant_id
        first = grants.first_token(grant_id) if sequence.await_first else None
        if not grants.is_complete(grant_id) or (sequence.await_first and first is None):
            reason = self._probe(received, now, await_first=sequence.await_first)
            if reason is not None:
                state.tally.receives_failed += 1
                state.finish(sequence, "error", now, error=TransferFailed(reason))
            return
        try:
            self._verify(grant_id)
        except TransferFailed as error:
            state.tally.receives_failed += 1
            state.finish(sequence, "error", now, error=error)
            return
        self._take_received(sequence, received, now)
        state.receiving.remove(sequence)
        if first is not None:
            sequence.is_mixed |= sequence.has_foreign_kv
            sequence.token_ids.append(first)
            sequence.num_delivered = sequence.num_output_tokens
            self._mark_first(sequence, now)
            state.count("generated_tokens")
            reason, stop = self._stop_reason(sequence, first)
            if reason is not None:
                state.finish(sequence, reason, now, stop_token_id=stop)
                return
        state.scheduler.add_ready(sequence)

    def _take_received(self, sequence: Sequence, received: ReceivedGrant, now: float) -> None:
        """All KV of the grant is in and verified."""
        self._state.memory.seal(received)
        self._measure(received, now)
        if not self._state.memory.goes_on(sequence, received.grant.end):
            # All of it, from its tokens; what has come is of no use to it.
            self._state.memory.release(sequence, now)
            sequence.received_tokens = sequence.cached_tokens = 0
        else:
            sequence.num_computed = max(sequence.num_computed, received.grant.end)
        sequence.ready_at = now if sequence.started_at is None else min(now, sequence.started_at)
        self._state.count("received_tokens", sequence.received_tokens)
        _logger.debug(log.KV_RECEIVED, request_id=sequence.request_id, num_tokens=sequence.received_tokens)

    def _measure(self, received: ReceivedGrant, now: float) -> None:
        grant, layout = received.grant, self._state.memory.grants.layout
        nbytes = len(grant.blocks) * layout.block_nbytes * layout.num_layers
        self._state.tally.received(grant.heap.kind, now - received.opened_at, nbytes)

    def _take_commit(self, record: Record, job: CommitJob, now: float) -> None:
        state, received = self._state, record.received
        if received is None:
            return
        grant_id = received.grant_id
        if not state.memory.grants.is_complete(grant_id):
            reason = self._probe(received, now)
            if reason is not None:
                state.tally.receives_failed += 1
                state.fail_commit(record, TransferFailed(reason))
                state.close_received(record, now)
            return
        try:
            self._verify(grant_id)
        except TransferFailed as error:
            state.tally.receives_failed += 1
            state.fail_commit(record, error)
            state.close_received(record, now)
            return
        job.sealed_blocks = state.memory.grants.block_table(grant_id)
        state.memory.seal(received)
        self._measure(received, now)

    def _settle(self, received: ReceivedGrant) -> None:
        """The last writer has drained: received blocks are as good as computed ones."""
        state, holder = self._state, received.holder
        if isinstance(holder, Sequence):
            state.memory.settle(holder, received)
            return
        job = holder.commit if isinstance(holder, RecordOf) else None
        if not isinstance(holder, RecordOf) or job is None or job.sealed_blocks is None:
            raise InternalError(f"grant {received.grant_id} has settled, and its holder has not sealed it")
        num_tokens = state.memory.commit(received, job.sealed_blocks)
        state.count("commits_of_another_class", received.is_foreign)
        holder.commit = None
        state.committing.remove(holder)
        state.count("commits")
        _logger.info(log.KV_COMMITTED, request_id=holder.request_id, num_tokens=num_tokens)
        state.outbox.replies.append((holder.owner, wire.Committed(job.call_id, num_tokens)))

    def _verify(self, grant_id: str) -> None:
        for layer in range(self._num_layers):
            self._state.memory.grants.verify(grant_id, layer)

    def _probe(self, received: ReceivedGrant, now: float, *, await_first: bool = False) -> str | None:
        """Look at the writers, if it is time: why what is awaited will never be whole, None while it may."""
        if now - received.probed_at < PROBE_INTERVAL_S:
            return None
        received.probed_at, grant_id = now, received.grant_id
        grants = self._state.memory.grants
        reason = grants.poisoned(grant_id, await_first=await_first)
        # A writer may have finished between our two looks.
        is_whole = grants.is_complete(grant_id) and not (await_first and grants.first_token(grant_id) is None)
        return None if is_whole else reason

    def _early_step(self, now: float) -> Step | None:
        """Nothing else to do: start a receiver whose first layer is in on its own share.

        The first layer is complete only when its sender has reached its last chunk, so the wait for the other
        layers is as long as one forward pass that is running already.
        """
        state = self._state
        grants = state.memory.grants
        if state.scheduler.waiting or state.encoding:
            return None  # their receivers may be what it would wait for
        if state.memory.states is not None:
            return None  # a hybrid model's first layers need the state that comes with the next one
        for sequence in state.receiving:
            if sequence.received is None or sequence.await_first or sequence.guiding is not None:
                continue
            grant = sequence.received.grant
            if grant.end < sequence.num_tokens and grants.layer_complete(grant.grant_id, 0):
                step = state.scheduler.schedule_early(sequence, grant.end, now)
                if step is not None:
                    state.receiving.remove(sequence)
                    state.count("early_starts")
                return step
        return None

    # --- after a step ------------------------------------------------------------------------------

    def complete(self, step: Step, result: StepResult, now: float) -> None:
        """Book the step's KV, sampled tokens and sent rows."""
        state = self._state
        state.inflight = []
        self.num_steps += 1
        self.rates.measure(step, now)
        state.tally.stepped(step.num_tokens, step.num_decodes, now - step.started_at)
        if step.early is not None and step.early.received is not None:
            self._take_received(step.early, step.early.received, now)
        for share in step.sends:
            transfer = share.sequence.transfer
            if transfer is not None and transfer.error is None:
                transfer.sent_until = share.hi
        each = zip(step.sequences, step.batch.chunks, result.sampled, strict=True)
        for place, (sequence, chunk, sampled) in enumerate(each):
            scored = result.scored.get(place)
            error = (sampled and sampled.error) or (scored and scored.error)
            if chunk.score is not None and scored is None:
                error = InternalError("the runner has scored nothing")
            if error:
                # Nothing of its share counts: what broke its logits may stand in its KV.
                state.count("sequences_failed")
                state.finish(sequence, sequence.doomed or "error", now, error=sequence.doom_error or error)
                continue
            end = chunk.start + len(chunk.token_ids)
            if end > sequence.num_computed:
                sequence.computed_tokens += end - sequence.num_computed
                state.memory.advance(sequence, end)
            state.memory.insert(sequence)
            if scored is not None:
                sequence.take_scored(scored)
                state.count("scored_tokens", len(chunk.score.targets) if chunk.score is not None else 0)
            self._advance(sequence, sampled, now)
        for share in step.sends:
            if share.sequence not in step.sequences:
                self._advance(share.sequence, None, now)

    def _advance(self, sequence: Sequence, sampled: Sampled | None, now: float) -> None:
        """Decide what becomes of a sequence after its share of a step."""
        state, transfer = self._state, sequence.transfer
        if sequence.doomed is not None:
            state.finish(sequence, sequence.doomed, now, error=sequence.doom_error)
        elif transfer is not None:
            if transfer.error is not None:
                state.finish(sequence, "error", now, error=transfer.error)
                return
            if sampled is not None:
                self._append(sequence, sampled, now)
                if transfer.writer is not None:
                    transfer.writer.set_first_token(sampled.token_id)
            if transfer.sent_until >= transfer.end and (sampled is not None or not sequence.needs_logits):
                if is_put(transfer):
                    state.finish(sequence, "stop", now)
                    return
                state.scheduler.remove(sequence)
                sequence.state = SequenceState.ENCODING
                state.encoding.append(sequence)
        elif sampled is not None:
            self._append(sequence, sampled, now)
            state.count("generated_tokens")
            reason, stop = self._stop_reason(sequence, sampled.token_id)
            if reason is not None:
                state.finish(sequence, reason, now, stop_token_id=stop, new_tokens=1)
            else:
                state.emit(sequence, 1, None)
        elif not sequence.samples and sequence.num_computed >= sequence.num_tokens:
            state.finish(sequence, "length", now)
        elif sequence.scored is not None:
            state.emit(sequence, 0, None)

    def _append(self, sequence: Sequence, sampled: Sampled, now: float) -> None:
        sequence.is_mixed |= sequence.has_impure_kv
        sequence.token_ids.append(sampled.token_id)
        if sequence.first_token_at is None:
            self._mark_first(sequence, now)
        else:
            self._state.tally.inter_token.observe(now - sequence.last_token_at)
            sequence.last_token_at = now
        if sampled.logprob is not None:
            sequence.logprobs.append(wire.TokenLogprob(sampled.logprob, sampled.top))

    def _mark_first(self, sequence: Sequence, now: float) -> None:
        sequence.first_token_at = sequence.last_token_at = now
        if sequence.transfer is None:
            self._state.tally.began(
                now - sequence.arrived_at,
                sequence.num_prompt_tokens,
                sequence.cached_tokens,
                sequence.received_tokens,
            )

    def _stop_reason(self, sequence: Sequence, token_id: int) -> tuple[str | None, int | None]:
        params, limits = sequence.params, self._state.limits
        if params is None:
            return None, None
        if token_id in limits.eos_token_ids and params.ends_by_eos():
            return "stop", token_id
        if token_id in params.stop_token_ids:
            return "stop", token_id
        room = limits.room(self._state.memory.block_size)
        if sequence.num_output_tokens >= params.max_tokens or sequence.num_tokens >= room:
            return "length", None
        return None, None

    def put_back(self, step: Step) -> None:
        """An early start gave way: its sequence waits as before. What it wrote will be written again."""
        state, sequence = self._state, step.early
        state.inflight = []
        if sequence is None:
            raise InternalError("only an early start can be put back")
        state.scheduler.remove(sequence)
        sequence.state = SequenceState.RECEIVING
        sequence.num_computed, sequence.started_at = 0, None
        state.receiving.append(sequence)
        state.count("early_starts_put_back")
        if sequence.doomed is not None:
            state.finish(sequence, sequence.doomed, step.started_at, error=sequence.doom_error)

    def fail(self, step: Step, error: MeshError, now: float) -> None:
        """The step raised: nothing of it counts, and every sequence in it ends with the error."""
        state = self._state
        sequences = list(state.inflight)
        state.inflight = []
        state.count("steps_failed")
        for sequence in sequences:
            if sequence.state is not SequenceState.FINISHED:
                state.finish(sequence, sequence.doomed or "error", now, error=sequence.doom_error or error)
