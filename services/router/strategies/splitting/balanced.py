"""Balanced disaggregation: the decode engine computes the prompt's tail itself.

Source: MicroServe, arXiv 2412.12488 ("balanced PD"): moves work from a prefill engine that is the
bottleneck to decode engines that wait.
"""

from __future__ import annotations

from microserve.services.router.authoring import Annotated, Chunks, Mesh, Meta, Request, strategy


@strategy
async def balanced(
    mesh: Mesh, request: Request, *, ratio: Annotated[float, Meta(ge=0.0, le=1.0)] = 0.1
) -> Chunks:
    """Prefill most of the prompt on one engine and the last ``ratio`` of it where it decodes."""
    decode = mesh.pick("decode", request)
    prefill = mesh.pick("prefill", request, exclude=[decode])
    split = request.num_tokens - int(request.num_tokens * ratio)
    grant = await decode.prep_recv(request, end=split)
    sending = prefill.remote_send(request, grant, end=split)
    yield decode.start_generate(request, begin=split, after=sending)
