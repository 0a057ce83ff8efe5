"""KV cost: prefill work that a prefix saves, beside the blocks and requests that an engine already carries.

Source: Dynamo's KV router: scale * max(0, prefill blocks - credit * overlap) + decode blocks + w * requests;
the least wins, or a min-max softmax by temperature. The incoming prompt's own decode blocks are the same
everywhere and left out; blocks in use are those that the engine reports.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Engine, Mesh, Meta, Request, strategy

Weight = Annotated[float, Meta(ge=0.0)]


@strategy
async def kv_cost(
    mesh: Mesh,
    request: Request,
    *,
    prefill_scale: Weight = 1.0,
    credit: Weight = 1.0,
    request_weight: Weight = 0.0,
    temperature: Weight = 0.0,
) -> Chunks:
    """Serve where the cost is least, counted in blocks; at a ``temperature`` > 0 draw by it.

    ``credit`` > 1 prefers warm engines beyond what they save, ``request_weight`` is blocks per request there.
    """

    def cost(engine: Engine) -> float:
        load, block_size = mesh.load(engine), request.block_size
        raw = (load.uncached_tokens + request.num_tokens) / block_size
        overlap = mesh.prefix(request).get(engine.id, 0) / block_size
        used = engine.info.num_blocks - load.free_blocks
        return prefill_scale * max(0.0, raw - credit * overlap) + used + request_weight * load.sequences

    engine = mesh.pick(None, request, cost=cost, temperature=temperature)
    yield engine.start_generate(request)
