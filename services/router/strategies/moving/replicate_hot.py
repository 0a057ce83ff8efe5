"""Hot prefixes on more engines: what many requests begin with is copied before they queue for its one holder.

Source: Mooncake, arXiv 2407.00079, section 6.2 (cache load balancing by replicating hot blocks). There a
request that needs the copy makes it; here a plan does, so that no request waits for it.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress

from microserve.services.router.authoring import (
    Annotated,
    CapacityError,
    Chunks,
    Mesh,
    Meta,
    PeerError,
    PlanMesh,
    Request,
    strategy,
)

Count = Annotated[int, Meta(ge=1)]
Period = Annotated[float, Meta(gt=0.0)]


async def copy_hot(mesh: PlanMesh, *, period_s: float, hot: int) -> None:
    """Every period: one more copy of each prefix that is hot; what was counted before weighs half."""
    while True:
        await asyncio.sleep(period_s)
        heat = mesh.state.setdefault("heat", {})
        for prefix, salt, adapter in [key for key, count in heat.items() if count >= hot]:
            with suppress(CapacityError, PeerError):  # in the next period, if it is hot by then
                async with mesh.request(prefix, salt=salt, adapter=adapter, ttl_s=5.0) as (inner, request):
                    source = inner.pick(None, request, prefix=True)
                    target = inner.pick(
                        None, request, exclude=[source], cost=lambda e: -inner.uncached(e, request)
                    )
                    is_less = inner.uncached(source, request) < inner.uncached(target, request)
                    if is_less and target.keeps_kv_of(source):
                        grant = await target.prep_recv(request)
                        source.remote_send(request, grant, first_token=False)
                        await target.commit(request, grant)
        mesh.state["heat"] = {key: count // 2 for key, count in heat.items() if count > 1}


@strategy(plan=copy_hot)
async def replicate_hot(
    mesh: Mesh, request: Request, *, depth: Count = 16, hot: Count = 4, period_s: Period = 1.0
) -> Chunks:
    """Serve where the fewest tokens are to be computed; a prefix is the prompt's first ``depth`` blocks."""
    prefix = tuple(request.tokens[: depth * request.block_size])
    if len(prefix) == depth * request.block_size:
        heat = mesh.state.setdefault("heat", {})
        key = prefix, request.salt, request.adapter
        heat[key] = heat.get(key, 0) + 1
    engine = mesh.pick(None, request, cost=lambda e: mesh.load(e).uncached_tokens + mesh.uncached(e, request))
    yield engine.start_generate(request)
