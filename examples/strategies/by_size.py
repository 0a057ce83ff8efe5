"""Short prompts and long ones do not wait for each other: each kind has engines of its own.

Nobody labels anything: engines are shared out in the order of their ids, so all routers share them out alike.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def by_size(
    mesh: Mesh,
    request: Request,
    *,
    border: Annotated[int, Meta(ge=1)] = 1_000,
    share: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.5,
) -> Chunks:
    """Prompts of ``border`` tokens or more on the share ``share`` of the engines, the others on the rest."""
    engines = sorted(mesh.engines(), key=lambda engine: engine.id)
    num_long = max(1, round(share * len(engines)))
    others = engines[num_long:] if request.num_tokens >= border else engines[:num_long]
    # With one engine nobody else is left, and ``exclude`` yields.
    yield mesh.pick(None, request, exclude=others).start_generate(request)
