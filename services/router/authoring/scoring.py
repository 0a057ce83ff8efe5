"""Scorers: what speaks for an engine, one reason each, for ``mesh.pick(..., scorers={...: weight})``.

A scorer is a function ``(mesh, engine, request) -> float``, more is better, in any unit: ``pick`` stretches
the scores of the candidates over 0 to 1 before it weighs them, so a weight says how much a reason matters
and not what it is measured in. A reason that speaks for all alike counts for nothing. Write your own beside
these.

Source: llm-d's scorer pipeline (weighted sum); Dynamo's min-max softmax, where temperature has no unit.
"""

from __future__ import annotations

import math

from microserve.services.router.authoring.action.engine import Engine
from microserve.services.router.authoring.mesh import Mesh, Scorer
from microserve.services.router.request.request import Request

READS_ONLY = ("",)
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


def load(mesh: Mesh, engine: Engine, request: Request) -> float:
    """Few prompt tokens that are still to be computed there."""
    return -mesh.load(engine).uncached_tokens


def sequences(mesh: Mesh, engine: Engine, request: Request) -> float:
    """Few sequences there: a decode step is the longer the more it carries."""
    return -mesh.load(engine).sequences


def prefix_match(mesh: Mesh, engine: Engine, request: Request) -> float:
    """Much of this prompt in the engine's cache."""
    return mesh.prefix(request).get(engine.id, 0)


def labelled(label: str) -> Scorer:
    """The operator's ``label`` (a cluster, a rack, a kind of machine). Engines without it may still serve."""
    return lambda mesh, engine, request: float(label in engine.labels)


def link_to(target: Engine) -> Scorer:
    """Fast puts into ``target``. One that has never sent there counts as the fastest: so it is tried."""
    return lambda mesh, engine, request: mesh.link(engine, target) or math.inf


def link_from(source: Engine) -> Scorer:
    """Fast puts from ``source``; otherwise as :func:`link_to`."""
    return lambda mesh, engine, request: mesh.link(source, engine) or math.inf
