"""How a running request leaves an engine that drains: its KV is sent away and the stream goes on elsewhere.

Owns the move alone; when to make it, and what follows when it fails, is serving.py's and failover.py's.
Whole blocks of the known tokens stand in the source's prefix cache, so the source computes (almost) nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import structlog

from microserve.protocol import log
from microserve.protocol.errors import EngineLost, MeshError, PeerError
from microserve.services.links.engine import EngineConnection
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring.grant import Sending
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.request.request import Request

GRANT_S = 2.0
"""Longest wait for room on the target; computing again elsewhere is then the better choice. The source stays
for longer (``MOVE_S`` in the engine's actions.py), or until an abort says that nothing will be asked."""

_logger = structlog.get_logger()


class EngineLeaving(EngineLost):
    """The engine drains and others are there: ends a stream on it after the tokens that are in. Not sent."""

    def __init__(self, source: EngineConnection) -> None:
        super().__init__(f"engine {source.engine_id} leaves the mesh")
        self.source = source


class MoveFailed(PeerError):
    """The KV could not be moved; nothing was delivered. Not sent."""


async def move(mesh: Mesh, request: Request, source: EngineConnection) -> AsyncGenerator[Tokens, None]:
    """Continue ``request`` on another engine with the KV that ``source`` has of it.

    Raises :class:`MoveFailed` for whatever goes wrong before the first new token.
    """
    leaving = mesh.departing(source)
    num_chunks = 0
    try:
        target = mesh.pick("decode", request)
        # The newest token has no KV yet: its block is left to the target.
        end = (request.num_tokens - 1) // request.block_size * request.block_size
        async with asyncio.timeout(GRANT_S):
            grant = await target.prep_recv(request, end=end)
        sending = leaving.remote_send(request, grant, end=end, first_token=False)
        if sending.is_settled:  # the target has all of it
            leaving.abort(request)

        def tell(sending: Sending) -> None:
            if sending.sent is not None:
                _logger.info(
                    log.REQUEST_MOVED,
                    request_id=request.request_id,
                    source=source.engine_id,
                    target=target.id,
                    tokens=grant.end,
                    matched=grant.matched,
                    sent=sending.sent.sent,
                    computed=sending.sent.computed,
                )

        sending.listen(tell)
        async for tokens in target.start_generate(request, begin=grant.end, grant=grant):
            yield tokens
            num_chunks += 1
    except EngineLeaving:
        raise
    except (MeshError, TimeoutError) as error:
        if num_chunks:
            raise
        leaving.abort(request)
        failure = MoveFailed(f"from {source.engine_id}: {str(error) or 'no room elsewhere in time'}")
        failure.suspect = getattr(error, "suspect", "")
        raise failure from error
