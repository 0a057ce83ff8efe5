"""The one door for authors of strategies: everything that a strategy file needs, in one import.

    from microserve.services.router.authoring import Mesh, Request, strategy

Owns the programming model (docs/strategies.md): what a strategy is (definition.py), what it sees (mesh.py,
view.py), what it can do (action/), what it keeps between requests (plan.py), and how the router runs its
code (driver.py; ../oversight bounds it). Must not know who asks, which version is published, or what a failed
attempt leads to. The shipped strategies (../strategies) use this door and nothing else; what is not named
here is the router's own and may change. Start at mesh.py, then action/engine.py.
"""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from microserve.protocol.errors import CapacityError, InvalidRequest, NoEngines, PeerError, QueueFull
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.links.stream import Tokens
from microserve.services.router.authoring import scoring as scorer
from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.action.generating import Chunks, Generating
from microserve.services.router.authoring.action.grant import GrantHandle, Sending
from microserve.services.router.authoring.action.race import Entrant
from microserve.services.router.authoring.definition import strategy
from microserve.services.router.authoring.mesh import Mesh, Scorer
from microserve.services.router.authoring.offloading import (
    Offload,
    Way,
    follow_links,
    forget_request,
    offload,
)
from microserve.services.router.authoring.plan import PlanMesh
from microserve.services.router.authoring.splitting import Split, alone_s, cheapest_split
from microserve.services.router.authoring.view import EngineFacts, MeshView
from microserve.services.router.engines.load import Load
from microserve.services.router.request.outcome import Outcome
from microserve.services.router.request.request import Request

__all__ = [
    "strategy",
    "Mesh",
    "PlanMesh",
    "MeshView",
    "Request",
    "SamplingParams",
    "Outcome",
    "Engine",
    "EngineFacts",
    "Load",
    "Tokens",
    "Chunks",
    "Generating",
    "Entrant",
    "GrantHandle",
    "Sending",
    "scorer",
    "Scorer",
    "alone_s",
    "cheapest_split",
    "Split",
    "offload",
    "Offload",
    "Way",
    "follow_links",
    "forget_request",
    "Annotated",
    "Meta",
    "QueueFull",
    "InvalidRequest",
    "CapacityError",
    "NoEngines",
    "PeerError",
]
