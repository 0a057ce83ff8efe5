"""A strategy beside its test, as an author has it (test_in_memory.py)."""

from __future__ import annotations

from collections import Counter

from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def in_turn(mesh: Mesh, request: Request) -> Chunks:
    """The engine that has had the fewest requests."""
    turns: Counter[str] = mesh.state.setdefault("turns", Counter())
    engine = mesh.pick(None, request, cost=lambda engine: turns[engine.id])
    turns[engine.id] += 1
    yield engine.start_generate(request)
