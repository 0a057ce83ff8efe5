"""The end of a generation request in numbers: usage for the client, metrics, the canonical lines.

Pure reading: nothing here changes a request.
"""

from __future__ import annotations

from collections.abc import Iterable

from microserve.gateway.generation.summary import Summary, Timeline, write_line
from microserve.gateway.http.errors import ClientGone
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.openai.answer import UsageCounts
from microserve.gateway.state import GatewayState
from microserve.gateway.text.choice import Sequence
from microserve.protocol.errors import MeshError


def usage_of(sequences: Iterable[Sequence], n: int) -> UsageCounts:
    """Tokens of a whole answer with ``n`` choices for each prompt; a prompt counts once."""
    prompt_tokens = completion_tokens = cached_tokens = 0
    for sequence in sequences:
        completion_tokens += sequence.num_output_tokens
        if sequence.index % n == 0:
            prompt_tokens += sequence.num_prompt_tokens
            if sequence.ended is not None:
                cached_tokens += sequence.ended.usage.cached_tokens
    return UsageCounts(prompt_tokens, completion_tokens, cached_tokens)


def account(
    state: GatewayState,
    exchange: Exchange,
    sequences: list[Sequence],
    times: Timeline,
    *,
    stream: bool,
    failure: MeshError | None,
) -> None:
    """Count a finished request and write its lines; ``times`` are those of a request without sequences."""
    assert times.ended is not None
    code = "" if failure is None else failure.code
    state.metrics.answered(exchange.status, code or "ok", times.ended - times.arrived)
    if isinstance(failure, ClientGone):
        state.metrics.disconnected(_phase(times, sequences))
    if not sequences:
        write_line(
            Summary(
                request_id=f"{exchange.unique_id}-0",
                http_request_id=exchange.request_id,
                times=times,
                status=exchange.status,
                code=code,
                finish_reason=_reason(None, failure),
                model=state.model,
                path=exchange.path,
                stream=stream,
            )
        )
    for sequence in sequences:
        reason = _reason(sequence, failure)
        state.metrics.sequence_ended(reason, sequence.num_output_tokens)
        ended = sequence.ended
        write_line(
            Summary(
                request_id=f"{exchange.unique_id}-{sequence.index}",
                http_request_id=exchange.request_id,
                times=sequence.times,
                status=exchange.status,
                code=code,
                finish_reason=reason,
                model=state.model,
                path=exchange.path,
                stream=stream,
                index=sequence.index,
                prompt_tokens=sequence.num_prompt_tokens,
                output_tokens=sequence.num_output_tokens,
                strategy="" if ended is None else ended.strategy,
                strategy_version=0 if ended is None else ended.strategy_version,
                engines=[] if ended is None else ended.engines,
                cached_tokens=0 if ended is None else ended.usage.cached_tokens,
                received_tokens=0 if ended is None else ended.usage.received_tokens,
                phases=None if ended is None else ended.phases,
            )
        )


def _reason(sequence: Sequence | None, failure: MeshError | None) -> str:
    """``stop`` or ``length`` of a finished sequence, whatever became of the others; else why it has none."""
    if sequence is not None and sequence.finish_reason is not None:
        return sequence.finish_reason
    return "abort" if isinstance(failure, ClientGone) else "error"


def _phase(times: Timeline, sequences: list[Sequence]) -> str:
    if times.submitted is None:
        return "queued"
    return "decode" if any(sequence.times.first_token is not None for sequence in sequences) else "prefill"
