"""Balanced disaggregation that finds its own split, or none: what is measured says whether two engines pay.

Source: MicroServe, arXiv 2412.12488 ("balanced PD"), with the split made per request from what is measured
(DynaServe, arXiv 2504.09285, also splits at any token). The decode engine computes its share one layer behind
the prefill engine's last chunk. Decodes of a full batch keep the share ``reserve`` of their engine.
"""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated,
    Chunks,
    Mesh,
    Meta,
    Request,
    alone_s,
    cheapest_split,
    strategy,
)


@strategy
async def balanced_adaptive(
    mesh: Mesh,
    request: Request,
    *,
    reserve: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.5,
    min_share: Annotated[int, Meta(ge=1)] = 64,
    worth: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.5,
    margin: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.0,
    codec: str = "",
    lossy: bool = False,
) -> Chunks:
    """Send ``min_share`` tokens or more, the share ``worth`` of those computed for it or more, where that
    saves the share ``margin`` of what the request costs all who are served; or nothing. By ``codec``, which
    may be ``lossy``."""
    two = cheapest_split(mesh, request, reserve=reserve)
    one = mesh.pick("decode", request, can=(), cost=lambda e: alone_s(mesh, request, e))
    spared, computed = (two.end - mesh.prefix(request).get(e.id, 0) for e in (two.decode, two.prefill))
    is_cheaper = two.cost_s < (1 - margin) * alone_s(mesh, request, one)
    is_worth_it = is_cheaper and spared >= max(min_share, worth * computed)
    if not (is_worth_it and two.decode.keeps_kv_of(two.prefill)):
        generation = one.start_generate(request)
    else:
        grant = await two.decode.prep_recv(request, end=two.end, lossy=lossy or None)
        two.prefill.remote_send(request, grant, end=two.end, codec=codec)
        generation = two.decode.start_generate(request, begin=two.end, grant=grant)
    yield generation
