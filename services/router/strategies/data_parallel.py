"""Data parallel: each request is one engine's own. The base line of every other strategy.

Source: MicroServe, arXiv 2412.12488, figure "data parallel"; what every replicated server does.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator

from microserve.services.router.authoring import Mesh, Request, Tokens, strategy


@strategy
async def data_parallel(mesh: Mesh, request: Request) -> AsyncGenerator[Tokens, None]:
    """Prefill and decode on the engine with the least work."""
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield tokens
