"""What is said of a generation, or of a send, at its end: to its router, to the log, to its trace.

Reads sequences; decides nothing (state.py does).
"""

from __future__ import annotations

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import MeshError
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import MIXED, Numerics
from microserve.services.engine.core import trace
from microserve.services.engine.core.request.sequence import Sequence, Transfer

_logger = structlog.get_logger()


def tell_finished(
    sequence: Sequence,
    reason: str,
    now: float,
    numerics: Numerics,
    error: MeshError | None,
    stop_token_id: int | None,
) -> wire.Finished:
    """``numerics``: the class of the engine."""
    first = now if sequence.first_token_at is None else sequence.first_token_at
    started = now if sequence.started_at is None else sequence.started_at
    finished = wire.Finished(
        reason=reason,
        usage=wire.Usage(
            prompt_tokens=sequence.num_prompt_tokens,
            cached_tokens=sequence.cached_tokens,
            received_tokens=sequence.received_tokens,
            output_tokens=sequence.num_output_tokens,
            num_preemptions=sequence.num_preemptions,
        ),
        timings=wire.Timings(
            queued_s=max(0.0, started - sequence.ready_at),
            arrival_s=sequence.ready_at - sequence.arrived_at,
            prefill_s=max(0.0, first - started),
            decode_s=max(0.0, now - first),
        ),
        code=error.code if error else "",
        detail=error.detail if error else "",
        stop_token_id=stop_token_id,
        numerics=Numerics(MIXED) if sequence.is_mixed else numerics,
    )
    _logger.info(
        log.REQUEST_FINISHED,
        request_id=sequence.request_id,
        action="generate",
        finish=reason,
        code=finished.code,
        numerics=finished.numerics.name,
        exact=finished.numerics.is_exact,
        **msgspec.structs.asdict(finished.usage),
        **_rounded(finished.timings),
    )
    trace.generated(sequence.traceparent, sequence.request_id, now - sequence.arrived_at, finished)
    return finished


def tell_sent(sequence: Sequence, transfer: Transfer, now: float, numerics: Numerics) -> wire.Sent:
    """``numerics``: the class of the engine."""
    started = now if sequence.started_at is None else sequence.started_at
    sampled = sequence.num_tokens > transfer.end
    peer, outgoing = transfer.peer, transfer.outgoing
    network_s = peer.network_s(transfer.nbytes) if peer is not None else 0.0
    sent = wire.Sent(
        call_id=sequence.call_id,
        request_id=sequence.request_id,
        computed=sequence.computed_tokens,
        cached=sequence.cached_tokens,
        sent=max(0, transfer.end - max(transfer.begin, transfer.grant.matched)),
        nbytes=transfer.nbytes,
        timings=wire.Timings(
            queued_s=started - sequence.arrived_at,
            prefill_s=max(0.0, now - started - transfer.put_s),
            transfer_s=max(transfer.put_s, network_s),
        ),
        first_token=sequence.token_ids[-1] if sampled else None,
        first_logprob=sequence.logprobs[-1] if sampled and sequence.logprobs else None,
        heap=peer.address.kind if peer is not None else "",
        coding=outgoing.coding(network_s) if outgoing is not None else None,
    )
    coding = sent.coding
    codec = {} if coding is None else {"codec": coding.profile, "raw_nbytes": coding.raw_nbytes}
    _logger.info(
        log.KV_SENT,
        request_id=sequence.request_id,
        receiver=transfer.grant.engine_id,
        computed=sent.computed,
        cached=sent.cached,
        sent=sent.sent,
        nbytes=sent.nbytes,
        numerics=numerics.name,
        receiver_numerics=transfer.grant.numerics,
        **codec,
        **_rounded(sent.timings),
    )
    trace.sent(sequence.traceparent, now - sequence.arrived_at, sent, transfer.grant)
    return sent


def _rounded(timings: wire.Timings) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in msgspec.structs.asdict(timings).items()}
