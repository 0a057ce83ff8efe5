"""The soonest first token: queue, prefill and, where it pays, fetching a prefix; refused when it is late.

Source: Mooncake (FAST'25), Algorithm 1: TTFT of each prefill engine with its own prefix or the best one of
the mesh (T_transfer); the least wins, beyond the SLO the request is rejected. Prefill time there is fitted
offline, here by the rate that the engine measures. It decodes in place where the labels let it.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from microserve.services.router.authoring import Chunks, Engine, Mesh, QueueFull, Request, scorer, strategy


@strategy
async def min_ttft(
    mesh: Mesh,
    request: Request,
    *,
    slo_s: Annotated[float, Meta(gt=0.0)] = 30.0,
    balance: Annotated[float, Meta(ge=1.0)] = 2.0,
) -> Chunks:
    """Prefill where the first token is soonest, in ``slo_s``; fetch a prefix ``balance`` times one's own."""
    held = mesh.prefix(request)

    def fetched(engine: Engine, source: Engine) -> int:
        best = held.get(source.id, 0)
        return best if best > balance * held.get(engine.id, 0) else 0

    def ttft_s(engine: Engine) -> float:
        own, source = held.get(engine.id, 0), mesh.source_for(engine, request)
        have = max(own, fetched(engine, source))
        transfer_s = mesh.transfer_s(source, engine, have - own)
        return transfer_s + mesh.predicted_ttft_s(engine, request.num_tokens - have)

    prefill = mesh.pick("prefill", request, can=(), cost=ttft_s)
    late_s = ttft_s(prefill) - slo_s
    if late_s > 0.0 and not request.num_output_tokens:  # what has begun is not refused
        raise QueueFull(f"no first token within {slo_s:g} s", retry_after_s=min(max(late_s, 0.5), 60.0))
    source = mesh.source_for(prefill, request)
    if end := fetched(prefill, source):
        copy = await prefill.prep_recv(request, end=end)
        source.remote_send(request, copy, end=end, first_token=False)
        await prefill.commit(request, copy)
    if prefill in mesh.engines("decode"):
        generation = prefill.start_generate(request)
    else:
        decode = mesh.pick("decode", request, exclude=[prefill], scorers={scorer.sequences: 1.0})
        grant = await decode.prep_recv(request)
        prefill.remote_send(request, grant)
        generation = decode.start_generate(request, begin=grant.end, grant=grant)
    yield generation
