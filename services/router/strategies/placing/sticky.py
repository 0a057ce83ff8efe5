"""Session affinity that gives way to load: what belongs together goes to one engine while that has room.

Source: rendezvous hashing (Thaler and Ravishankar, 1998) with the bound of Mirrokni et al., "Consistent
Hashing with Bounded Loads" (arXiv 1608.01350). No router remembers anything, and all choose alike.
"""

from __future__ import annotations

from hashlib import blake2b

from microserve.services.router.authoring import Annotated, Chunks, Engine, Mesh, Meta, Request, strategy


@strategy
async def sticky(
    mesh: Mesh,
    request: Request,
    *,
    by: str = "user",
    factor: Annotated[float, Meta(ge=1.0)] = 1.5,
) -> Chunks:
    """Requests with the same attribute ``by`` on one engine, or on the next in their order when it has more
    than ``factor`` times its share of the sequences; those without it where the least is to be done."""
    value = request.attributes.get(by)
    engines = mesh.engines()
    if not value or not engines:
        yield mesh.pick(None, request).start_generate(request)
        return

    def lot(engine: Engine) -> bytes:
        return blake2b(f"{value} {engine.id}".encode(), digest_size=8).digest()

    bound = factor * (1 + sum(mesh.load(engine).sequences for engine in engines)) / len(engines)
    free = [engine for engine in engines if mesh.load(engine).sequences < bound]
    yield max(free, key=lot).start_generate(request)
