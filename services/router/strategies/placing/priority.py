"""Full batches and no more, and of those that wait the most important first.

Source: vLLM's priority scheduling, done before the engines: there a request that is late but more important
has to push out one that runs. ``priority`` is that of the API key.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def priority(
    mesh: Mesh,
    request: Request,
    *,
    places: Annotated[int, Meta(ge=1)] = 32,
    most: Annotated[int, Meta(ge=0)] = 1_000,
    max_s: Annotated[float, Meta(gt=0.0)] = 60.0,
) -> Chunks:
    """At most ``places`` sequences an engine; ``most`` requests may wait for ``max_s``."""

    def has_room() -> bool:
        return any(mesh.load(engine).sequences < places for engine in mesh.engines())

    rank = float(request.attributes.get("priority", 0))
    await mesh.hold(request, has_room, rank=rank, most=most, max_s=max_s)
    yield mesh.pick(None, request).start_generate(request)
