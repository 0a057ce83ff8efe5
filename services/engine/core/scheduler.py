"""Which tokens run in the next step: continuous batching with chunked prefill under one token budget.

Sans-I/O: ``schedule(now)`` looks at the queues and returns a :class:`Step`; ``add``, ``remove`` and
``preempt`` move sequences between them. Order of service: decodes first (one token each), then those whose KV
has arrived and that lack one token, then prefills that have begun, then waiting sequences, oldest first (past
a head that does not fit only when nothing else runs). Sends and local prefills share that order. When blocks
run out, the youngest running sequence gives its blocks back and recomputes later: it keeps its tokens, so
none is lost or repeated.

A step that carries a send never waits for KV of another engine; only a step with one receiving sequence alone
may (``Step.early``). So two engines that send to each other can never wait for each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec, TokenView
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.request.sequence import Sequence, SequenceState

MAX_OVERTAKEN_S = 2.0
"""A sequence that has waited so long at the head is not overtaken any more."""


@dataclass(slots=True)
class SendShare:
    """Rows ``[lo, hi)`` of a sending sequence, to be put layer by layer in this step."""

    sequence: Sequence
    lo: int
    hi: int


@dataclass(slots=True)
class Step:
    """One step. ``sequences[i]`` owns ``batch.chunks[i]``."""

    batch: Batch
    sequences: list[Sequence]
    sends: list[SendShare] = field(default_factory=list)
    early: Sequence | None = None
    """The only sequence of the batch, whose KV arrives while its own share is computed."""
    num_decodes: int = 0
    started_at: float = 0.0

    @property
    def is_scored(self) -> bool:
        """It makes logits for its prompts' sake."""
        return any(chunk.score is not None for chunk in self.batch.chunks)

    @property
    def num_tokens(self) -> int:
        return sum(len(chunk.token_ids) for chunk in self.batch.chunks)


class Scheduler:
    """Queues of sequences. Every call is made under the engine's lock."""

    def __init__(
        self,
        memory: KvMemory,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_num_scored: int,
        eos_token_ids: frozenset[int],
        on_preempt: Callable[[Sequence], None],
    ) -> None:
        """``max_num_scored``: rows of a step whose logits a prompt is told of. They take memory."""
        self._memory = memory
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._max_num_scored = max_num_scored
        self._eos_token_ids = eos_token_ids
        self._on_preempt = on_preempt
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission: the last is the first to be preempted."""

    @property
    def queued_prefill_tokens(self) -> int:
        pending = [s for s in (*self.waiting, *self.running) if not s.is_decoding()]
        return sum([len(s.token_ids) - s.num_computed for s in pending])

    def add(self, sequence: Sequence) -> None:
        sequence.state = SequenceState.WAITING
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Forget it; its blocks are the caller's business."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def schedule(self, now: float) -> Step | None:
        """The next step, or None when nothing can run."""
        step = Step(Batch([]), [], started_at=now)
        budget = self._max_num_batched_tokens
        decodes: list[Sequence] = []
        prefills: list[Sequence] = []
        for sequence in self.running:
            (decodes if sequence.is_decoding() else prefills).append(sequence)
        budget -= self._place_each(step, decodes, budget)
        budget -= self._place_arrived(step, budget, now)
        budget -= self._place_each(step, prefills, budget)
        while self.waiting and budget > 0 and len(self.running) < self._max_num_seqs:
            if self._admit(self.waiting[0], now):
                budget -= self._place(step, self.running[-1], budget)
            elif not self._reclaim(now):
                if not self.running:
                    self._admit_past_head(step, budget, now)
                break
        return step if step.batch.chunks or step.sends else None

    def _place_each(self, step: Step, sequences: list[Sequence], budget: int) -> int:
        """Those that still run: placing one may preempt another."""
        left = budget
        for sequence in sequences:
            if sequence.state is SequenceState.RUNNING and left > 0:
                left -= self._place(step, sequence, left)
        return budget - left

    def _place_arrived(self, step: Step, budget: int, now: float) -> int:
        """Received sequences at the head that lack one token: they are decodes but for their place. Behind a
        long prefill they would wait for all of it. Not where the prefill's next chunk could take their blocks
        from them again."""
        left = budget
        while self.waiting and left > 0 and len(self.running) < self._max_num_seqs:
            head = self.waiting[0]
            if not head.blocks or head.is_send or head.num_uncomputed() > 1:
                break
            missing = self._memory.missing_blocks(head, head.num_positions)
            chunk = -(-left // self._memory.block_size) + len(self.running)
            if not self._memory.pool.has(missing + chunk) or not self._admit(head, now):
                break
            left -= self._place(step, head, left)
        return budget - left

    def schedule_early(self, sequence: Sequence, end: int, now: float) -> Step | None:
        """A step of one receiving sequence alone: its KV below ``end`` arrives layer by layer meanwhile."""
        step = Step(Batch([]), [], early=sequence, started_at=now)
        if not self._memory.grow(sequence, min(end + self._max_num_batched_tokens, sequence.num_tokens) + 1):
            return None
        sequence.num_computed = end
        sequence.state = SequenceState.RUNNING
        sequence.started_at = now
        self.running.append(sequence)
        self._place(step, sequence, self._max_num_batched_tokens)
        return step

    def add_ready(self, sequence: Sequence) -> None:
        """A sequence whose KV has arrived: first in line, since it holds blocks; but not for ever."""
        sequence.state = SequenceState.WAITING
        is_old = bool(self.waiting) and sequence.ready_at - self.waiting[0].arrived_at > MAX_OVERTAKEN_S
        self.waiting.insert(1 if is_old else 0, sequence)

    def _admit_past_head(self, step: Step, budget: int, now: float) -> None:
        """Nothing runs and the head cannot: run the first that can.

        The head may need more than is left beside grants whose KV is still to come, and the sends that bring
        it, here or on an engine in the same place, would wait behind it for ever."""
        for sequence in list(self.waiting)[1:]:
            if self._admit(sequence, now):
                self._place(step, sequence, budget)
                return

    def _reclaim(self, now: float) -> bool:
        """Nothing runs and the head does not fit: waiting sequences that hold blocks give them back.

        True if one did (try again). They recompute later, so this only costs time.
        """
        if self.running:
            return False
        for sequence in reversed(self.waiting):
            if sequence.blocks and sequence is not self.waiting[0]:
                self._memory.release(sequence, now)
                sequence.num_preemptions += 1
                self._on_preempt(sequence)
                return True
        return False

    def _admit(self, sequence: Sequence, now: float) -> bool:
        """Move a waiting sequence to running if its known tokens fit beside what runs."""
        matched_here = not sequence.blocks
        if matched_here:
            self._memory.match(sequence)
        missing = self._memory.missing_blocks(sequence, sequence.num_positions)
        # One spare block per running sequence keeps an admission from causing a preemption at once.
        spare = len(self.running)
        if not self._memory.pool.has(missing + spare):
            if matched_here:
                self._memory.release(sequence, now)
            return False
        self.waiting.remove(sequence)
        self.running.append(sequence)
        sequence.state = SequenceState.RUNNING
        if matched_here and sequence.num_preemptions == 0:
            sequence.cached_tokens = sequence.num_cached
        if sequence.started_at is None:
            sequence.started_at = now
        return True

    def _place(self, step: Step, sequence: Sequence, budget: int) -> int:
        """Give the sequence its share of the step; the tokens that it takes from the budget."""
        start = sequence.num_computed
        if not sequence.is_scored:
            budget = min(budget, self._score_limit(step, sequence) - start)
        if sequence.keeps and sequence.keeps[0] > start:
            budget = min(budget, sequence.keeps[0] - start)
        whole = start >= sequence.num_tokens
        if whole and sequence.needs_logits:
            # Everything is in the cache: run the last token again for its logits, write nothing.
            tokens, start, write_from = sequence.token_ids[-1:], sequence.num_tokens - 1, sequence.num_tokens
        else:
            tokens = sequence.token_ids[start : start + budget]
            write_from = start
        end = start + len(tokens)
        while not self._memory.grow(sequence, end):
            victim = self._youngest(sequence)
            self.preempt(victim, step)
            if victim is sequence:
                return 0
        transfer = sequence.transfer
        if transfer is not None:
            hi = end if tokens else sequence.num_tokens
            if hi > transfer.sent_until:
                step.sends.append(SendShare(sequence, transfer.sent_until, hi))
        if not tokens:
            return 0
        spec = None
        if sequence.params is not None and sequence.samples and end == sequence.num_tokens:
            spec = SampleSpec(
                sequence.params,
                TokenView(sequence.token_ids, 0, sequence.num_prompt_tokens),
                TokenView(sequence.token_ids, sequence.num_prompt_tokens, sequence.num_tokens),
                self._eos_token_ids,
                sequence.guide,
            )
        step.num_decodes += sequence.is_decoding()
        score = None if sequence.is_scored else sequence.score_of(start, end)
        chunk = Chunk(sequence.sequence_id, tokens, start, list(sequence.blocks), write_from, spec, score)
        if self._memory.states is not None:
            chunk.state_from, chunk.state_to = sequence.state_from or None, sequence.state_to
        step.batch.chunks.append(chunk)
        step.sequences.append(sequence)
        return len(tokens)

    def _score_limit(self, step: Step, sequence: Sequence) -> int:
        """How far a sequence that is not scored yet may be computed in this step."""
        scores = (chunk.score for chunk in step.batch.chunks)
        left = self._max_num_scored - sum(len(score.targets) for score in scores if score is not None)
        limit = sequence.num_scored - 1 + left
        return sequence.num_tokens if limit >= sequence.num_prompt_tokens - 1 else limit

    def _youngest(self, sequence: Sequence) -> Sequence:
        """Whom to preempt: the last admitted (which may be the one in need)."""
        return self.running[-1] if self.running else sequence

    def preempt(self, sequence: Sequence, step: Step) -> None:
        """Take its blocks, and itself out of ``step``; it will recompute from its tokens, first in line."""
        if sequence in step.sequences:
            index = step.sequences.index(sequence)
            step.num_decodes -= sequence.is_decoding()
            del step.sequences[index], step.batch.chunks[index]
        step.sends = [share for share in step.sends if share.sequence is not sequence]
        self.running.remove(sequence)
        self._memory.release(sequence, step.started_at)
        sequence.state = SequenceState.WAITING
        sequence.num_preemptions += 1
        self.waiting.appendleft(sequence)
        self._on_preempt(sequence)
