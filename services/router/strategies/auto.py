"""The default: where the tokens are cheapest, and disaggregated only when that pays.

Source: llm-d's token-aware routing (2026-08): affinity to a warm engine unless too much waits there, else
pure token load, ``uncached tokens in flight + prompt * (1 - hit)``. Dynamo's conditional disaggregation:
remote prefill only for long uncached prompts.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Engine, Mesh, Meta, Request, strategy


@strategy
async def auto(
    mesh: Mesh,
    request: Request,
    *,
    affinity: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.8,
    tau: Annotated[int, Meta(ge=0)] = 16_384,
    threshold: Annotated[int, Meta(ge=1)] = 2_048,
) -> Chunks:
    """Decode where the tokens are cheapest; prefill elsewhere if ``threshold`` or more are uncached.

    An engine that holds at least the share ``affinity`` of the prompt comes first, unless more than ``tau``
    uncached tokens wait there (its prefill tokens a second, times the seconds that one would wait).
    """

    def cost(engine: Engine) -> int:
        uncached, waiting = mesh.uncached(engine, request), mesh.load(engine).uncached_tokens
        is_warm = uncached <= request.num_tokens * (1 - affinity) and waiting <= tau
        return -1 if is_warm else waiting + uncached

    decode = mesh.pick("decode", request, cost=cost)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    is_worth_it = mesh.uncached(decode, request) >= threshold and mesh.load(prefill) < mesh.load(decode)
    if not (is_worth_it and decode.keeps_kv_of(prefill)):
        generation = decode.start_generate(request)
    else:
        grant = await decode.prep_recv(request)
        sending = prefill.remote_send(request, grant)
        generation = decode.start_generate(request, begin=grant.end, after=sending)
    yield generation
