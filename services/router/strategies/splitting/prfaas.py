"""Long prompts computed by another cluster: by a threshold on uncached tokens that goes as the link goes.

Source: PrfaaS, arXiv 2604.15039, section 3.4: while the link has room a cache of either cluster counts and is
copied, while it has none each cluster is judged by its own. docs/clusters.md says what is ours.
"""

from __future__ import annotations

from microserve.services.router.authoring import (
    Annotated,
    Chunks,
    Engine,
    Mesh,
    Meta,
    Request,
    follow_links,
    forget_request,
    offload,
    strategy,
)


@strategy(plan=follow_links, on_end=forget_request)
async def prfaas(
    mesh: Mesh,
    request: Request,
    *,
    home: str = "",
    threshold: Annotated[int, Meta(ge=0)] = 2_048,
    link_gbps: Annotated[float, Meta(ge=0.0)] = 0.0,
    period_s: Annotated[float, Meta(gt=0.0)] = 1.0,
    replan: bool = True,
    codec: str = "",
) -> Chunks:
    """Prompts with over ``threshold`` uncached tokens go to the other cluster; answers come from ``home``."""
    rule = offload(mesh, home=home, threshold=threshold, link_gbps=link_gbps)
    way = rule.choose(mesh, request)

    def work(engine: Engine) -> int:
        return mesh.load(engine).uncached_tokens + mesh.uncached(engine, request)

    decode = mesh.pick("decode", request, cluster=way.home, cost=work)
    prefill = mesh.pick("prefill", request, cluster=way.cluster, exclude=[decode], cost=work)
    computing = prefill if decode.keeps_kv_of(prefill) else decode
    if way.copied:
        source = mesh.pick(None, request, cluster=way.source, prefix=True)
        if computing.keeps_kv_of(source):
            copy = await computing.prep_recv(request, end=way.copied)
            sending = source.remote_send(request, copy, end=copy.end, first_token=False)
            rule.watch(mesh, request, source, sending)
            await computing.commit(request, copy)
    if computing == decode:
        generation = decode.start_generate(request)
    else:
        grant = await decode.prep_recv(request)
        rule.watch(mesh, request, prefill, prefill.remote_send(request, grant, codec=codec))
        generation = decode.start_generate(request, begin=grant.end, grant=grant)
    yield generation
