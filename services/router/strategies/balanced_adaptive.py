"""Balanced disaggregation that finds its own split: both engines have done their shares at the same time.

Source: MicroServe, arXiv 2412.12488 ("balanced PD"), with the split made per request from what is measured
(DynaServe, arXiv 2504.09285, also splits at any token). The decode engine computes its share one layer behind
the prefill engine's last chunk. Decodes of a full batch keep the share ``reserve`` of their engine.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import Annotated

from microserve.services.router.authoring import Chunks, Engine, Mesh, Meta, Request, scorer, strategy


def even_split(mesh: Mesh, request: Request, prefill: Engine, decode: Engine, reserve: float) -> int:
    """The first position from the decode engine's match on where the prefill engine is done no sooner."""
    p, d = mesh.load(prefill), mesh.load(decode)
    rate = p.prefill_tokens_per_s or d.prefill_tokens_per_s or 1.0  # unknown: like the other
    occupancy = min(1.0, d.running / max(1, decode.reported.max_num_seqs))
    decode_rate = (d.prefill_tokens_per_s or rate) * (1.0 - reserve * occupancy)
    matched, cached = (request.num_tokens - mesh.uncached(engine, request) for engine in (decode, prefill))

    def lead_s(split: int) -> float:
        """How much later the prefill engine ends than the decode engine."""
        computed_s = (p.uncached_tokens + max(0, split - cached)) / rate
        sent_s = mesh.transfer_s(prefill, decode, d.transfer_tokens + split - matched)
        return max(computed_s, sent_s) - (d.uncached_tokens + request.num_tokens - split) / decode_rate

    return matched + bisect_left(range(matched, request.num_tokens), 0.0, key=lead_s)


@strategy
async def balanced_adaptive(
    mesh: Mesh,
    request: Request,
    *,
    reserve: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5,
    min_share: Annotated[int, Meta(ge=1)] = 64,
    worth: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5,
) -> Chunks:
    """Send ``min_share`` tokens or more, the share ``worth`` of those computed for it or more, or nothing."""
    decode = mesh.pick("decode", request, scorers={scorer.load: 1.0, scorer.prefix_match: 1.0})
    warm = {scorer.load: 1.0, scorer.prefix_match: 1.0, scorer.link_to(decode): 0.5}
    prefill = mesh.pick("prefill", request, exclude=[decode], scorers=warm)
    split = even_split(mesh, request, prefill, decode, reserve)
    spared, computed = (split - mesh.prefix(request).get(engine.id, 0) for engine in (decode, prefill))
    is_worth_it = spared >= max(min_share, worth * computed) and decode.keeps_kv_of(prefill)
    split = split if is_worth_it and prefill != decode else 0
    grant = await decode.prep_recv(request, end=split)
    prefill.remote_send(request, grant, end=split)
    yield decode.start_generate(request, begin=split, grant=grant)
