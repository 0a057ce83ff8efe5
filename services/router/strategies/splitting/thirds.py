"""A long prompt over several engines: each computes a part, and all of it comes together where it decodes.

Source: MicroServe, arXiv 2412.12488: its actions put together once more. A part needs the KV of those before
it, so that is copied to its engine first; one request is not faster by it than on one engine, but no engine
is held by a whole long prompt (as in Mooncake's chunked pipeline parallelism, arXiv 2407.00079).
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Engine, Mesh, Meta, Request, strategy


@strategy
async def thirds(
    mesh: Mesh,
    request: Request,
    *,
    parts: Annotated[int, Meta(ge=2, le=8)] = 3,
    least: Annotated[int, Meta(ge=1)] = 256,
) -> Chunks:
    """``parts`` parts of whole blocks, none of fewer than ``least`` tokens; the last one where it decodes."""
    decode = mesh.pick("decode", request)
    engines: list[Engine] = []
    while len(engines) + 1 < min(parts, request.num_tokens // least):
        engine = mesh.pick("prefill", request, exclude=[decode, *engines])
        if engine in (decode, *engines) or not decode.keeps_kv_of(engine):
            break
        engines.append(engine)
    step = request.num_tokens // (len(engines) + 1) // request.block_size * request.block_size
    grant = await decode.prep_recv(request, end=step * len(engines))
    for number, engine in enumerate(engines):
        begin, end = step * number, step * (number + 1)
        if number:
            known = await engine.prep_recv(request, end=begin)
            engines[number - 1].remote_send(request, known, end=begin, first_token=False)
            await engine.commit(request, known)
        if end > grant.matched:
            engine.remote_send(request, grant, begin=max(begin, grant.matched), end=end, first_token=False)
    yield decode.start_generate(request, begin=grant.end, grant=grant)
