"""What an engine has done, in numbers that only grow: for its metrics. Plain state, added to under the
engine's lock.

Each method is called once for a token, a step, a request or a transfer, and adds to numbers; nothing is
looked up by name and nothing is made. Knows no sequence and no grant: those who do hand in their numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from microserve.protocol.messages.engine import Finished, Sent, Usage
from microserve.protocol.metrics.family import Family
from microserve.protocol.metrics.histogram import Histogram
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import engine as table

FINISH_REASONS = ("stop", "length", "abort", "error")
STEP_KINDS = ("prefill", "decode", "mixed", "send")


def _made(family: Family) -> Histogram:
    return Histogram(family.bounds)


class Tally:
    def __init__(self) -> None:
        self.first_token, self.inter_token = _made(table.TTFT), _made(table.INTER_TOKEN)
        self.per_token, self.whole = _made(table.TPOT), _made(table.E2E)
        self.arrival, self.queue = _made(table.ARRIVAL_TIME), _made(table.QUEUE_TIME)
        self.prefill, self.decode = _made(table.PREFILL_TIME), _made(table.DECODE_TIME)
        self.inference = _made(table.INFERENCE_TIME)
        self.prompt_length, self.output_length = _made(table.PROMPT_LENGTH), _made(table.OUTPUT_LENGTH)
        self.computed_length, self.max_tokens = _made(table.COMPUTED_LENGTH), _made(table.MAX_TOKENS)
        self.choices = _made(table.N)
        self.step_tokens = _made(table.STEP_TOKENS)
        self.steps = {kind: _made(table.STEP_SECONDS) for kind in STEP_KINDS}
        self.computed_tokens = self.cached_tokens = self.received_tokens = 0
        """Of prompts, by where their KV came from."""
        self.sends: dict[str, tuple[Histogram, Histogram]] = {}
        """Seconds and bytes, by kind of heap; and of what came here."""
        self.receives: dict[str, tuple[Histogram, Histogram]] = {}
        self.sends_failed: Counter[str] = Counter()
        """By error code."""
        self.receives_failed = 0

    # --- adding --------------------------------------------------------------------------------------

    def stepped(self, num_tokens: int, num_decodes: int, seconds: float) -> None:
        """A step has been computed; ``num_decodes`` of its tokens are decodes."""
        if not num_tokens:
            kind = "send"
        elif num_decodes == num_tokens:
            kind = "decode"
        else:
            kind = "mixed" if num_decodes else "prefill"
        self.steps[kind].observe(seconds)
        self.step_tokens.observe(num_tokens)

    def began(self, seconds: float, num_prompt: int, num_cached: int, num_received: int) -> None:
        """The first token of a generation, ``seconds`` after it came here."""
        self.first_token.observe(seconds)
        self.take_prompt(num_prompt, num_cached, num_received)

    def take_prompt(self, num_prompt: int, num_cached: int, num_received: int) -> None:
        """Tokens of a prompt, and of these those that were cached here, or sent here."""
        num_received = min(num_received, num_prompt)
        num_cached = min(num_cached, num_prompt - num_received)
        self.cached_tokens += num_cached
        self.received_tokens += num_received
        self.computed_tokens += num_prompt - num_cached - num_received

    def ended(self, finished: Finished, max_tokens: int) -> None:
        """A generation is over; its reason is counted elsewhere. Times are of those that came to their
        end."""
        if finished.reason not in ("stop", "length"):
            return
        usage, timings = finished.usage, finished.timings
        if not usage.output_tokens:
            self.take_prompt(usage.prompt_tokens, usage.cached_tokens, usage.received_tokens)
        self._measure_lengths(usage, max_tokens)
        inference_s = timings.prefill_s + timings.decode_s
        self.arrival.observe(timings.arrival_s)
        self.queue.observe(timings.queued_s)
        self.prefill.observe(timings.prefill_s)
        self.decode.observe(timings.decode_s)
        self.inference.observe(inference_s)
        self.whole.observe(timings.arrival_s + timings.queued_s + inference_s)
        if usage.output_tokens > 1:
            self.per_token.observe(timings.decode_s / (usage.output_tokens - 1))

    def _measure_lengths(self, usage: Usage, max_tokens: int) -> None:
        self.prompt_length.observe(usage.prompt_tokens)
        self.output_length.observe(usage.output_tokens)
        self.computed_length.observe(
            max(0, usage.prompt_tokens - usage.cached_tokens - usage.received_tokens)
        )
        self.max_tokens.observe(max_tokens)
        self.choices.observe(1)

    def sent(self, sent: Sent) -> None:
        """A send is done."""
        self.take_prompt(sent.computed + sent.cached, sent.cached, 0)
        if sent.nbytes:
            _measure(self.sends, sent.heap, sent.timings.transfer_s, sent.nbytes)

    def received(self, heap: str, seconds: float, nbytes: int) -> None:
        """All KV of a grant is in, ``seconds`` after that was given."""
        _measure(self.receives, heap, seconds, nbytes)

    # --- reading -------------------------------------------------------------------------------------

    def read(self, readings: Readings, counters: Mapping[str, int]) -> None:
        """``counters``: the engine's own, by name."""
        for family, histogram in (
            (table.TTFT, self.first_token),
            (table.INTER_TOKEN, self.inter_token),
            (table.TPOT, self.per_token),
            (table.E2E, self.whole),
            (table.ARRIVAL_TIME, self.arrival),
            (table.QUEUE_TIME, self.queue),
            (table.PREFILL_TIME, self.prefill),
            (table.DECODE_TIME, self.decode),
            (table.INFERENCE_TIME, self.inference),
            (table.PROMPT_LENGTH, self.prompt_length),
            (table.OUTPUT_LENGTH, self.output_length),
            (table.COMPUTED_LENGTH, self.computed_length),
            (table.MAX_TOKENS, self.max_tokens),
            (table.N, self.choices),
            (table.STEP_TOKENS, self.step_tokens),
        ):
            readings.add(family, histogram)
        readings.add_each(table.STEP_SECONDS, self.steps)
        computed, cached, received = self.computed_tokens, self.cached_tokens, self.received_tokens
        readings.add(table.PROMPT_TOKENS, computed + cached + received)
        readings.add(table.PROMPT_CACHED, cached + received)
        readings.add_each(
            table.PROMPT_SOURCES,
            {"local_compute": computed, "local_cache_hit": cached, "external_kv_transfer": received},
        )
        for families, measured in (
            ((table.SEND_SECONDS, table.SEND_NBYTES), self.sends),
            ((table.RECEIVE_SECONDS, table.RECEIVE_NBYTES), self.receives),
        ):
            for heap, histograms in measured.items():
                for family, histogram in zip(families, histograms, strict=True):
                    readings.add(family, histogram, heap)
        readings.add_each(table.SENDS_FAILED, dict(self.sends_failed) or {"transfer_failed": 0})
        readings.add(table.RECEIVES_FAILED, self.receives_failed)
        for reason in FINISH_REASONS:
            readings.add(table.FINISHED, counters.get(f"generate_{reason}", 0), reason)
        for family, name in _BY_COUNTER:
            readings.add(family, counters.get(name, 0))
        for reason, name in _REFUSED:
            readings.add(table.CUT_OFF, counters.get(name, 0), reason)


_BY_COUNTER = (
    (table.GENERATED, "generated_tokens"),
    (table.PREEMPTIONS, "preemptions"),
    (table.STEPS_FAILED, "steps_failed"),
    (table.EARLY_STARTS, "early_starts"),
    (table.GRANTS_OPENED, "grants_opened"),
    (table.GRANTS_REFUSED, "grants_refused"),
    (table.GRANTS_EXPIRED, "grants_expired"),
    (table.COMMITS, "commits"),
)
_REFUSED = (("grant", "grants_refused"), ("grammar", "grammars_refused"), ("sequence", "sequences_failed"))


def _measure(into: dict[str, tuple[Histogram, Histogram]], heap: str, seconds: float, nbytes: int) -> None:
    found = into.get(heap)
    if found is None:
        found = into[heap] = (Histogram(table.SEND_SECONDS.bounds), Histogram(table.SEND_NBYTES.bounds))
    found[0].observe(seconds)
    found[1].observe(nbytes)
