"""Everything that a strategy file needs, in one import. The programming model is documented in
docs/strategies.md; what is not named here is the router's own and may change.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from microserve.protocol.errors import CapacityError, PeerError, QueueFull
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring import scorer
from microserve.services.router.authoring.engine import Engine
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.plan import PlanMesh
from microserve.services.router.authoring.strategy import strategy
from microserve.services.router.engines.load import Load
from microserve.services.router.request.request import Request

__all__ = [
    "strategy",
    "Mesh",
    "PlanMesh",
    "Request",
    "Engine",
    "Load",
    "Tokens",
    "scorer",
    "Annotated",
    "Meta",
    "QueueFull",
    "CapacityError",
    "PeerError",
]
