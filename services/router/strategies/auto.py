"""The default: the engine where the tokens are cheapest; two engines where the mesh's rates say that it pays.

Source: llm-d's token-aware routing (2026-08): affinity to a warm engine unless too much waits there, else
pure token load, ``uncached tokens in flight + prompt * (1 - hit)``. The split is ``balanced_adaptive``'s;
docs/strategies.md says where it pays.
"""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated,
    Chunks,
    Engine,
    Mesh,
    Meta,
    Request,
    alone_s,
    cheapest_split,
    strategy,
)


@strategy
async def auto(
    mesh: Mesh,
    request: Request,
    *,
    affinity: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.8,
    tau: Annotated[int, Meta(ge=0)] = 16_384,
    threshold: Annotated[int, Meta(ge=1)] = 128,
    margin: Annotated[float, Meta(ge=0.0, lt=1.0)] = 0.05,
) -> Chunks:
    """One engine where the tokens are cheapest; two if ``threshold`` or more are uncached there, rates have
    been measured, and that is expected to save the share ``margin`` of what it costs all who are served.

    An engine that holds at least the share ``affinity`` of the prompt comes first, unless more than ``tau``
    uncached tokens wait there (its prefill tokens a second, times the seconds that one would wait).
    """

    def cost(engine: Engine) -> int:
        uncached, waiting = mesh.uncached(engine, request), mesh.load(engine).uncached_tokens
        is_warm = uncached <= request.num_tokens * (1 - affinity) and waiting <= tau
        return -1 if is_warm else waiting + uncached

    one = mesh.pick("decode", request, can=(), cost=cost)
    if mesh.load(one).prefill_tokens_per_s > 0.0:  # then labels are for splits: alone, any may be cheapest
        one = mesh.pick(None, request, cost=cost)
    two = cheapest_split(mesh, request)
    is_long = mesh.uncached(one, request) >= threshold and mesh.decode_cost_s(one) > 0.0
    is_worth_it = is_long and two.cost_s < (1 - margin) * alone_s(mesh, request, one)
    if not (is_worth_it and two.decode.keeps_kv_of(two.prefill)):
        generation = one.start_generate(request)
    else:
        is_known = mesh.link(two.prefill, two.decode) > 0.0
        end = two.end if is_known else min(two.end, threshold)  # who knows how slow that link is
        grant = await two.decode.prep_recv(request, end=end)
        two.prefill.remote_send(request, grant, end=end)
        generation = two.decode.start_generate(request, begin=end, grant=grant)
    yield generation
