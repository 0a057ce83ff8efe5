"""The default: where the tokens are cheapest, and disaggregated only when that pays.

Source: llm-d's token-aware routing (2026-08): affinity to a warm engine unless too much waits there, else
pure token load, ``uncached tokens in flight + prompt * (1 - hit)``. Dynamo's conditional disaggregation:
remote prefill only for long uncached prompts.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Annotated

from msgspec import Meta

from microserve.services.router.engine import Engine
from microserve.services.router.mesh import Mesh
from microserve.services.router.request import Request
from microserve.services.router.strategy import strategy
from microserve.services.router.stream import Tokens


@strategy
async def auto(
    mesh: Mesh,
    request: Request,
    *,
    affinity: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.8,
    tau: Annotated[int, Meta(ge=0)] = 16_384,
    threshold: Annotated[int, Meta(ge=1)] = 2_048,
) -> AsyncGenerator[Tokens, None]:
    """Decode on the cheapest engine; prefill elsewhere if more than ``threshold`` tokens are uncached.

    ``affinity``: engines with at least this share of the best prefix hit come first, unless more than
    ``tau`` uncached tokens wait on each of them (prefill tokens a second times the wait one accepts).
    """
    decode = cheapest(mesh, request, affinity, tau)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    uncached = request.num_tokens - mesh.prefix(request).get(decode.id, 0)
    if uncached < threshold or mesh.load(prefill) >= mesh.load(decode):
        generation = decode.start_generate(request)
    else:
        grant = await decode.prep_recv(request)
        sending = prefill.remote_send(request, grant)
        generation = decode.start_generate(request, begin=grant.end, after=sending)
    async for tokens in generation:
        yield tokens


def cheapest(mesh: Mesh, request: Request, affinity: float, tau: int) -> Engine:
    """The warm engine with the least work, or, when all warm ones are too busy, the least token load."""
    matched = mesh.prefix(request)
    engines = mesh.engines("decode")
    best = max((matched.get(engine.id, 0) for engine in engines), default=0)
    cold = [e for e in engines if matched.get(e.id, 0) < affinity * best or mesh.load(e).uncached_tokens > tau]
    if best == 0 or len(cold) == len(engines):
        return mesh.pick("decode", request, cost=lambda e: request.num_tokens - matched.get(e.id, 0))
    return mesh.pick("decode", request, exclude=cold)
