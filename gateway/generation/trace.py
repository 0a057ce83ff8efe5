"""Where one HTTP request stands in a trace, and its span, made after it has ended.

The client's ``traceparent`` is gone on from, if it is a valid one; else a trace begins here. All choices of a
request are in one span. Nothing of it is echoed, and no prompt, no answer and no key is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from microserve.gateway.api.format import UsageCounts
from microserve.gateway.generation.summary import phase_durations
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.text.answer.choice import Choice, Timeline
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.request_id import of_choice
from microserve.protocol.tracing import output
from microserve.protocol.tracing.names import Value
from microserve.protocol.tracing.span import Event, Span
from microserve.protocol.tracing.traceparent import TraceParent, make, parse

HEADER = b"traceparent"


class Trace:
    """``text`` goes with every choice to the routers; ``end`` once."""

    def __init__(self, own: TraceParent, parent_id: str, *, is_told: bool) -> None:
        """``is_told``: a span is made; else ``own`` is what routers are to be the children of."""
        self.text = own.text
        self._own = own
        self._parent_id = parent_id
        self._is_told = is_told

    def end(
        self,
        exchange: Exchange,
        choices: Sequence[Choice],
        times: Timeline,
        *,
        usage: Callable[[], UsageCounts],
        sampling: SamplingParams | None,
        n: int,
        stream: bool,
        failure: MeshError | None,
        model: str,
    ) -> None:
        """Nothing of what is given changes any more. ``times``: of what the choices have in common;
        ``sampling``: None where it did not get so far."""
        if self._is_told and times.ended is not None:
            code = "" if failure is None else failure.code  # and not its frames
            output.tell(
                self._spans, exchange, choices, times, times.ended, usage, sampling, n, stream, code, model
            )

    def _spans(
        self,
        exchange: Exchange,
        choices: Sequence[Choice],
        times: Timeline,
        ended: float,
        usage: Callable[[], UsageCounts],
        sampling: SamplingParams | None,
        n: int,
        stream: bool,
        code: str,
        model: str,
    ) -> list[Span]:
        operation = "text_completion" if exchange.path == "/v1/completions" else "chat"
        ended = max(ended, *(c.times.ended or 0.0 for c in choices)) if choices else ended
        first = min((c.times.first_token for c in choices if c.times.first_token is not None), default=None)
        counts = usage()
        values: dict[str, Value | None] = {
            "operation": operation,
            "provider": "microserve",
            "model": model,
            "request_id": of_choice(exchange.unique_id, 0),
            "http_request_id": exchange.request_id,
            "method": exchange.method,
            "path": exchange.path,
            "status": exchange.status or None,
            "stream": stream,
            "num_choices": n,
            "input_tokens": counts.prompt_tokens,
            "output_tokens": counts.completion_tokens,
            "cached_tokens": counts.cached_tokens,
            "reasoning_tokens": counts.reasoning_tokens,
            "finish_reasons": [c.finish_reason for c in choices if c.finish_reason is not None] or None,
            "ttft_s": None if first is None else first - times.arrived,
            "wall_s": ended - times.arrived,
        }
        if sampling is not None:
            for name in ("max_tokens", "temperature", "top_p", "top_k"):
                values[name] = getattr(sampling, name)
            values["presence_penalty"] = sampling.presence_penalty or None
            values["frequency_penalty"] = sampling.frequency_penalty or None
        if len(choices) == 1:  # phases are one choice's
            told = choices[0].ended
            phases = phase_durations(choices[0].times, None if told is None else told.phases)
            values |= {f"phase.{name}_s": microseconds / 1e6 for name, microseconds in phases.items()}
        marks = (("tokenising", times.tokenising), ("submitted", times.submitted), ("first_token", first))
        events = [Event(name, at) for name, at in marks if at is not None]
        span = (f"{operation} {model}", self._own, self._parent_id, times.arrived, ended, values)
        return [Span(*span, events=events, error=code)]


def trace_of(exchange: Exchange) -> Trace:
    """Of a request as its head came."""
    given = parse(exchange.only_header(HEADER))
    if not output.is_on():
        return Trace(given or make(is_sampled=False), "", is_told=False)
    if given is None:
        return Trace(make(is_sampled=True), "", is_told=True)
    if not given.is_sampled:
        return Trace(given, "", is_told=False)
    return Trace(given.child(), given.span_id, is_told=True)
