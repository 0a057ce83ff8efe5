"""Prefill/decode disaggregation: one engine computes the whole prompt, another one decodes.

Source: MicroServe, arXiv 2412.12488; DistServe, arXiv 2401.09670. The sender samples the first token, so it
reaches the client before the last byte of KV is acknowledged.
"""

from __future__ import annotations

from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def disaggregated(mesh: Mesh, request: Request, *, codec: str = "", lossy: bool = False) -> Chunks:
    """Prefill on one engine, decode on another; KV goes by ``codec``, which may be ``lossy``."""
    decode = mesh.pick("decode", request)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    grant = await decode.prep_recv(request, lossy=lossy or None)
    sending = prefill.remote_send(request, grant, codec=codec)
    yield decode.start_generate(request, begin=grant.end, after=sending)
