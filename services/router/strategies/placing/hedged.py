"""Hedged requests: a second engine begins when the first is silent for too long, and the faster one serves.

Source: Dean and Barroso, "The Tail at Scale" (CACM 2013). The second engine is the least busy of the others;
what it computes in vain is the price.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def hedged(mesh: Mesh, request: Request, *, after_s: Annotated[float, Meta(gt=0.0)] = 1.0) -> Chunks:
    """``after_s`` seconds more than predicted without a token: then the second begins as well."""
    first = mesh.pick(None, request)
    second = mesh.pick(None, request, exclude=[first])
    wait_s = after_s + mesh.predicted_ttft_s(first, mesh.uncached(first, request))
    yield await mesh.race(request, first, second, after_s=wait_s)
