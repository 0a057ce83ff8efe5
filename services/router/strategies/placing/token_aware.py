"""Token-aware routing: one measure, tokens still to be computed; a warm engine first while it is not busy.

Source: llm-d's token-aware routing (2026-08): the affinity filter keeps engines with a hit of 0.8 or more,
unless their uncached tokens in flight pass tau; then the score is those tokens + prompt * (1 - hit). tau is
prefill tokens a second times the wait that one accepts: calibrated by hand there, measured here.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Engine, Mesh, Meta, Request, strategy


@strategy
async def token_aware(
    mesh: Mesh,
    request: Request,
    *,
    affinity: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.8,
    penalty_s: Annotated[float, Meta(gt=0.0)] = 2.0,
) -> Chunks:
    """Serve where the fewest tokens have to be computed before the first one of the answer.

    An engine that holds the share ``affinity`` of the prompt comes before all that do not, unless its queue
    takes longer than ``penalty_s`` at its measured rate (without a measurement: it has no limit).
    """

    def is_warm(engine: Engine) -> bool:
        load = mesh.load(engine)
        is_busy = 0.0 < load.prefill_tokens_per_s * penalty_s < load.uncached_tokens
        return mesh.uncached(engine, request) <= request.num_tokens * (1 - affinity) and not is_busy

    def tokens_ahead(engine: Engine) -> int:
        return mesh.load(engine).uncached_tokens + mesh.uncached(engine, request)

    warm = [engine for engine in mesh.engines() if is_warm(engine)]
    cold = [engine for engine in mesh.engines() if engine not in warm] if warm else []
    engine = mesh.pick(None, request, exclude=cold, cost=tokens_ahead)
    yield engine.start_generate(request)
