"""How fast the engine is, measured step by step: what routers predict waiting times from.

Sans-I/O; knows steps by what they compute only. Each number is 0 until there is something to measure, is
then the first sample as a whole, and moves by a share of each later one.
"""

from __future__ import annotations

from microserve.protocol.smoothing import smoothed
from microserve.services.engine.core.measure.share import Share
from microserve.services.engine.core.request.sequence import Sequence, SequenceState
from microserve.services.engine.core.scheduler import Step

MAX_DECODE_JUMP = 4.0
"""A decode step counts as at most so many times the mean: a process that was frozen measures its absence."""


class Rates:
    """``measure`` every completed step."""

    def __init__(self) -> None:
        self.prefill_tokens_per_s = 0.0
        """Prompt tokens a second, of steps that are full of them."""
        self.decode_step_s = 0.0
        """Duration of a step without any prefill."""
        self.mean_output_tokens = 0.0
        """Of generating sequences that have ended here."""
        self._prefill, self._decode, self._transfer = Share(), Share(), Share()
        self._awaits_kv_since: float | None = None
        self._prefill_measured_at = 0.0
        self._largest_prefill = 0
        """Prompt tokens of the fullest step so far."""
        self._generating: list[Sequence] = []
        """Of the last step: those that have ended since are samples."""

    def prefill_rate_age_s(self, now: float) -> float:
        """Since the prefill rate was last measured; 0 before the first."""
        return now - self._prefill_measured_at if self._largest_prefill else 0.0

    def prefill_share(self, now: float) -> float:
        """Of the time until now, the last seconds counting most, what steps with prefill took."""
        return self._prefill.at(now)

    def decode_share(self, now: float) -> float:
        """Likewise, what steps without prefill took."""
        return self._decode.at(now)

    def transfer_share(self, now: float) -> float:
        """Likewise, what passed without a step that computes while KV was on its way."""
        return self._transfer.at(now)

    def rests(self, now: float, *, awaits_kv: bool) -> None:
        """Nothing can be computed; ``awaits_kv``: for KV is on its way."""
        self.goes_on(now)
        self._awaits_kv_since = now if awaits_kv else None

    def goes_on(self, now: float) -> None:
        """It looks again what there is to do."""
        if self._awaits_kv_since is not None:
            self._transfer.spent(now - self._awaits_kv_since, now)
            self._awaits_kv_since = None

    def measure(self, step: Step, now: float) -> None:
        """Take in a step that has just been computed, before its results are booked."""
        self._measure_outputs(step)
        elapsed = now - step.started_at
        if elapsed <= 0.0:
            return
        if not step.batch.chunks:
            self._transfer.spent(elapsed, now)
            return
        prefill = step.num_tokens - step.num_decodes
        if prefill:
            self._prefill.spent(elapsed, now)
        else:
            self._decode.spent(elapsed, now)
        if prefill > step.num_decodes and step.early is None:
            self._measure_prefill(prefill, prefill / elapsed, now, is_scored=step.is_scored)
        elif prefill == 0:
            known = self.decode_step_s
            self.decode_step_s = smoothed(known, min(elapsed, known * MAX_DECODE_JUMP or elapsed))

    def _measure_prefill(self, num_tokens: int, rate: float, now: float, *, is_scored: bool) -> None:
        """A step has a fixed cost beside its tokens, so a nearly empty one says only that a full one is no
        slower: it may raise the rate, never lower it. So it is with one that makes logits for its prompts. A
        step much fuller than any before begins anew."""
        known, largest = self.prefill_tokens_per_s, self._largest_prefill
        if (2 * num_tokens < largest or (is_scored and known)) and rate <= known:
            return
        self.prefill_tokens_per_s = rate if num_tokens > 2 * largest else smoothed(known, rate)
        self._prefill_measured_at = now
        self._largest_prefill = max(largest, num_tokens)

    def _measure_outputs(self, step: Step) -> None:
        for sequence in self._generating:
            if sequence.state is SequenceState.FINISHED and sequence.num_output_tokens:
                self.mean_output_tokens = smoothed(self.mean_output_tokens, sequence.num_output_tokens)
        self._generating = [sequence for sequence in step.sequences if sequence.transfer is None]
