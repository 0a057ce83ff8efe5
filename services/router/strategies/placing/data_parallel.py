"""Data parallel: each request is one engine's own. The base line of every other strategy.

Source: MicroServe, arXiv 2412.12488, figure "data parallel"; what every replicated server does.
"""

from __future__ import annotations

from microserve.services.router.authoring import Chunks, Mesh, Request, strategy


@strategy
async def data_parallel(mesh: Mesh, request: Request) -> Chunks:
    """Prefill and decode on the engine with the least work."""
    yield mesh.pick(None, request).start_generate(request)
