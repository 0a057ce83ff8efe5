"""By how it went: each engine's time to the first token, the newer the more, times what waits there.

Source: "peak EWMA" balancing of Finagle. It knows neither tokens nor caches, and still sees an engine that is
slow for reasons that no report shows: a hot neighbour, a throttled CPU.
"""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated,
    Chunks,
    Engine,
    Mesh,
    Meta,
    Outcome,
    PlanMesh,
    Request,
    strategy,
)

MOST = 1_000
"""Engines that are remembered: those that are gone must not add up."""


def learn(mesh: PlanMesh, request: Request, outcome: Outcome, *, share: float) -> None:
    """A failure counts as a slow answer, so that nobody hurries to an engine that fails quickly."""
    if mesh.is_shadow or not (outcome.is_own and outcome.engines):
        return
    means = mesh.state.setdefault("ttft_s", {})
    engine = outcome.engines[-1]
    took_s = outcome.ttft_s if outcome.ttft_s is not None else outcome.total_s
    mean_s = means.pop(engine, took_s)
    # A peak counts at once, and is forgotten slowly.
    means[engine] = max(took_s, mean_s + share * (took_s - mean_s))
    if len(means) > MOST:
        del means[next(iter(means))]


@strategy(on_end=learn)
async def ewma(
    mesh: Mesh, request: Request, *, share: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.2
) -> Chunks:
    """The least of mean time x requests there; ``share`` is what a new time counts for."""
    means = mesh.state.get("ttft_s", {})
    usual_s = sum(means.values()) / len(means) if means else 1.0

    def cost(engine: Engine) -> float:
        mean_s: float = means.get(engine.id, usual_s)
        return mean_s * (1 + mesh.load(engine).sequences)

    yield mesh.pick(None, request, cost=cost).start_generate(request)
