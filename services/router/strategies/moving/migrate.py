"""Context migration: move the KV of a prompt to another engine, then serve there.

Source: MicroServe, arXiv 2412.12488 ("context cache migration"); moving KV over a fast link is many times
cheaper than computing it again.
"""

from __future__ import annotations

from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def migrate(mesh: Mesh, request: Request) -> Chunks:
    """Move whole blocks from the engine that holds most of them to the one with the least work."""
    source = mesh.pick(None, request, prefix=True)
    target = mesh.pick(None, request, exclude=[source])
    if target != source and target.keeps_kv_of(source):
        grant = await target.prep_recv(request, end=request.num_block_tokens)
        source.remote_send(request, grant, end=grant.end, first_token=False)
        await target.commit(request, grant)
    yield target.start_generate(request)
