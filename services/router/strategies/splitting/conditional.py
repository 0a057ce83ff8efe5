"""Conditional disaggregation: prefill elsewhere only when that is worth a transfer, by one of three policies.

Source: Dynamo's conditional disaggregation. A decode engine prefills itself what is short and partly cached
(isl_bounding), or what would wait for a busy prefill engine (prefill_load), or either; never when it is
nearly full by its own report (Dynamo's lesson: a router's own count of a decode engine's blocks is too low).
"""

from __future__ import annotations

from typing import Literal

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, scorer, strategy

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Count = Annotated[int, Meta(ge=0)]


@strategy
async def conditional(
    mesh: Mesh,
    request: Request,
    *,
    policy: Literal["isl_bounding", "prefill_load", "isl_or_load"] = "isl_bounding",
    max_tokens: Count = 2_048,
    max_share: Share = 0.7,
    prefill_busy: Count = 8_192,
    decode_busy: Share = 0.9,
    codec: str = "",
    lossy: bool = False,
) -> Chunks:
    """Prefill in place when fewer than ``max_tokens`` and ``max_share`` of the prompt are uncached there, or
    when over ``prefill_busy`` tokens wait elsewhere; not while ``decode_busy`` of its blocks are full. KV
    goes by ``codec``, which may be ``lossy``."""
    decode = mesh.pick("decode", request, scorers={scorer.prefix_match: 1.0, scorer.load: 1.0})
    prefill = mesh.pick("prefill", request, exclude=[decode])
    uncached = mesh.uncached(decode, request)
    is_short = uncached < max_tokens and uncached < max_share * request.num_tokens
    is_slow = mesh.load(prefill).uncached_tokens > prefill_busy
    wants = {"isl_bounding": is_short, "prefill_load": is_slow, "isl_or_load": is_short or is_slow}[policy]
    is_full = mesh.load(decode).free_blocks < (1 - decode_busy) * decode.info.num_blocks
    if prefill == decode or not decode.keeps_kv_of(prefill) or (wants and not is_full):
        generation = decode.start_generate(request)
    else:
        grant = await decode.prep_recv(request, lossy=lossy or None)
        prefill.remote_send(request, grant, codec=codec)
        generation = decode.start_generate(request, begin=grant.end, grant=grant)
    yield generation
