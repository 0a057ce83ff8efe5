"""First where the prompt is cached, however full it is there; elsewhere at once when that does not work out.

An engine that refuses, is lost, or says nothing for too long costs the client a moment and no failed attempt.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def second_chance(
    mesh: Mesh, request: Request, *, silent_s: Annotated[float, Meta(gt=0.0)] = 5.0
) -> Chunks:
    """The longest prefix first; the least busy other one after ``silent_s`` without a token, or a failure."""
    first = mesh.pick(None, request, prefix=True)
    second = mesh.pick(None, request, exclude=[first])
    if mesh.uncached(first, request) == request.num_tokens:
        mesh.note("nobody has any of it")
    yield await mesh.race(request, first, second, after_s=silent_s)
