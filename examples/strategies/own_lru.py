"""Prefix affinity by the strategy's own memory: where it sent a prompt's beginning, it sends it again.

Needs no index and no events, as routers without exact KV do it; two routers remember apart. Bounded: the
beginning that was not seen for longest is forgotten.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy

Count = Annotated[int, Meta(ge=1)]


@strategy
async def own_lru(
    mesh: Mesh,
    request: Request,
    *,
    step: Count = 256,
    depth: Count = 32,
    most: Count = 20_000,
    factor: Annotated[float, Meta(ge=1.0)] = 2.0,
) -> Chunks:
    """Beginnings of ``step`` tokens, ``depth`` of them a prompt and ``most`` in all; the engine that had the
    longest, unless it has ``factor`` times its share of the requests."""
    known: dict[int, str] = mesh.state.setdefault("known", {})
    beginnings, mark = [], hash((request.salt, request.adapter))
    for end in range(step, min(request.num_tokens, step * depth) + 1, step):
        mark = hash((mark, *request.tokens[end - step : end]))
        beginnings.append(mark)
    engines = {engine.id: engine for engine in mesh.engines()}
    homes = (engines.get(known.get(mark, "")) for mark in reversed(beginnings))
    engine = next((home for home in homes if home is not None), None)
    bound = factor * (1 + sum(mesh.load(each).sequences for each in engines.values())) / max(1, len(engines))
    if engine is None or mesh.load(engine).sequences >= bound:
        engine = mesh.pick(None, request)
    for mark in beginnings:
        known.pop(mark, None)  # the newest stand last
        known[mark] = engine.id
    while len(known) > most:
        del known[next(iter(known))]
    yield engine.start_generate(request)
