"""One answer as it comes: bytes and their times in, an :class:`Outcome` out. Pure: the clock is given.

TTFT is the first chunk that says something; a first chunk with a role and no text, which many servers send,
is none. An answer whose tokens cannot be counted, or are not those that were asked for, is a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from microserve.services.command.bench.task import Outcome
from microserve.services.command.client.chunk import DONE, Usage, error_in, error_of, read_chunk
from microserve.services.command.client.sse import EventReader, EventTooLong

MAX_REFUSAL_NBYTES = 1 << 16

CONNECTION, HTTP, CUT, IN_STREAM = "connection", "http", "cut off", "error in the stream"
NO_CHUNK, EMPTY, NO_USAGE, WRONG_COUNT, TIMEOUT = (
    *("not a chunk", "empty answer", "no usage", "wrong count", "timeout"),
)


class Recorder:
    """Listens to one exchange (client/http.py)."""

    def __init__(
        self,
        outcome: Outcome,
        clock: Callable[[], float],
        *,
        max_tokens: int,
        exact_output: bool,
        expected_input: int | None = None,
    ) -> None:
        """``exact_output``: the answer may not end before ``max_tokens``."""
        self.outcome = outcome
        self._clock = clock
        self._max_tokens = max_tokens
        self._exact_output = exact_output
        self._expected_input = expected_input
        self._reader = EventReader()
        self._status = 0
        self._refusal = b""
        self._last_s = 0.0
        self._finish = ""
        self._usage: Usage | None = None
        self._is_done = False
        self._is_over = False

    # --- the listener ------------------------------------------------------------------------------

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        self.outcome.engines = headers.get("x-microserve-engines", "")
        self.outcome.strategy = headers.get("x-microserve-strategy", "")

    def body(self, data: bytes) -> None:
        if self._status != 200:
            self._refusal = (self._refusal + data)[:MAX_REFUSAL_NBYTES]
            return
        now = self._clock()
        try:
            for event in self._reader.push(data):
                self.event(event, now)
        except EventTooLong as error:
            self._fail(NO_CHUNK, str(error))

    def end(self, fault: str) -> None:
        outcome = self.outcome
        self._is_over = True
        if not outcome.end_s:
            outcome.end_s = self._clock()
        if self._status and self._status != 200:
            self._fail(f"{HTTP} {self._status}", error_in(self._refusal))
        elif fault:
            self._fail(CUT if self._status else CONNECTION, fault)
        elif not self._is_done:
            self._fail(CUT, "the stream ended without [DONE]")
        else:
            self._check()

    def give_up(self, seconds: float) -> None:
        self.outcome.end_s = self._clock()
        self._fail(TIMEOUT, f"no end within {seconds:g} s")

    # --- events ------------------------------------------------------------------------------------

    def event(self, data: bytes, now: float) -> None:
        """One event's data, read at ``now``."""
        if data == DONE:
            self._is_done = True
            return
        try:
            chunk = read_chunk(data)
        except (ValueError, RecursionError) as error:
            return self._fail(NO_CHUNK, str(error))
        if chunk.error is not None:
            return self._fail(IN_STREAM, error_of(chunk.error))
        outcome = self.outcome
        if chunk.choices:
            says_something = False
            for choice in chunk.choices:
                says_something = says_something or choice.says_something
                self._finish = choice.finish_reason or self._finish
            if says_something:
                if self._last_s:
                    outcome.gaps_s.append(now - self._last_s)
                else:
                    outcome.first_s = now
                self._last_s = now
            outcome.end_s = now
        if chunk.usage is not None:
            self._usage = chunk.usage
        return None

    def _check(self) -> None:
        outcome, usage = self.outcome, self._usage
        if usage is None:
            return self._fail(NO_USAGE, "the stream does not say how many tokens it had")
        outcome.input_tokens, outcome.output_tokens = usage.prompt_tokens, usage.completion_tokens
        if usage.completion_tokens < 1:
            return self._fail(EMPTY, "no token came")
        if not outcome.first_s:
            outcome.first_s = outcome.end_s  # tokens without text; they came, at the latest, with the end
        if usage.completion_tokens > self._max_tokens:
            return self._fail(
                WRONG_COUNT, f"{usage.completion_tokens} tokens where {self._max_tokens} were the most"
            )
        if self._exact_output and usage.completion_tokens != self._max_tokens:
            return self._fail(
                WRONG_COUNT,
                f"{usage.completion_tokens} tokens where {self._max_tokens} were asked for with ignore_eos",
            )
        if self._expected_input is not None and usage.prompt_tokens != self._expected_input:
            return self._fail(
                WRONG_COUNT, f"a prompt of {self._expected_input} ids counted as {usage.prompt_tokens}"
            )
        return None

    def _fail(self, kind: str, detail: str) -> None:
        if not self.outcome.fault:  # the first one tells; the others follow from it
            self.outcome.fault, self.outcome.detail = kind, detail
