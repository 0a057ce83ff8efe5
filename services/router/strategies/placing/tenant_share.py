"""Places for everybody: no tenant has more than a share of the mesh while others want some of it.

Source: virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", arXiv 2401.00588)
keep tenants even in tokens, which the router's turns do; this keeps places free at every moment, for tenants
that cannot wait for a long answer of another's to end.
"""

from __future__ import annotations

from collections import Counter

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def tenant_share(
    mesh: Mesh,
    request: Request,
    *,
    by: str = "tenant",
    share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.5,
    places: Annotated[int, Meta(ge=1)] = 32,
    most: Annotated[int, Meta(ge=0)] = 1_000,
) -> Chunks:
    """Of ``places`` sequences an engine, those of one value of ``by`` have at most the share ``share``, by
    this router's count; ``most`` of each may wait."""
    running: Counter[str] = mesh.state.setdefault("running", Counter())
    tenant = request.attributes.get(by, "")

    def has_place() -> bool:
        return running[tenant] < max(1, int(share * places * len(mesh.engines())))

    await mesh.hold(request, has_place, queue=tenant, most=most)
    running[tenant] += 1
    try:
        yield mesh.pick(None, request).start_generate(request)
    finally:
        running[tenant] -= 1
        if not running[tenant]:
            del running[tenant]
