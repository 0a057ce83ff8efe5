"""Cache-aware disaggregation: decode where the longest prefix is, send only what is missing there.

Source: MicroServe, arXiv 2412.12488 ("cache-aware PD").
"""

from __future__ import annotations

from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def cache_aware(mesh: Mesh, request: Request, *, codec: str = "", lossy: bool = False) -> Chunks:
    """No prefill engine at all when the decode engine holds every whole block of the prompt; else KV goes by
    ``codec``, which may be ``lossy``."""
    decode = mesh.pick("decode", request, prefix=True)
    grant = await decode.prep_recv(request, end=request.num_block_tokens, lossy=lossy or None)
    if not grant.is_complete:
        prefill = mesh.pick("prefill", request, exclude=[decode])
        prefill.remote_send(request, grant, begin=grant.matched, end=grant.end, codec=codec)
    yield decode.start_generate(request, begin=grant.end, grant=grant)
