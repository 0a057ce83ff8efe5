"""Scorers: what speaks for an engine, one reason each, for ``mesh.pick(..., scorers={...: weight})``.

A scorer is a function ``(mesh, engine, request) -> float``, more is better, in any unit: ``pick`` stretches
the scores of the candidates over 0 to 1 before it weighs them, so a weight says how much a reason matters
and not what it is measured in. A reason that speaks for all alike counts for nothing. Write your own beside
these.

Source: llm-d's scorer pipeline (weighted sum); Dynamo's min-max softmax, where temperature has no unit.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from microserve.protocol.errors import StrategyError
from microserve.services.router.request.request import Request

if TYPE_CHECKING:
    from microserve.services.router.authoring.engine import Engine
    from microserve.services.router.authoring.mesh import Mesh

    Scorer = Callable[[Mesh, Engine, Request], float]


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


def combined(
    mesh: Mesh, engines: Sequence[Engine], request: Request, scorers: Mapping[Scorer, float]
) -> list[float]:
    """Weighted sum of every engine's normalised scores. Raises :class:`StrategyError` for NaN and -inf."""
    totals = [0.0] * len(engines)
    for scorer, weight in scorers.items():
        scores = [scorer(mesh, engine, request) for engine in engines]
        if not all(score > -math.inf for score in scores) or not math.isfinite(weight):
            name = getattr(scorer, "__qualname__", repr(scorer))
            raise StrategyError(f"scorer {name} gave {scores} with weight {weight}")
        for position, share in enumerate(normalised(scores)):
            totals[position] += weight * share
    return totals


def normalised(scores: Sequence[float]) -> list[float]:
    """Stretched over [0, 1]; equal ones are 0. ``inf`` is as good as the best finite one."""
    finite = [score for score in scores if score < math.inf]
    if not finite:
        return [0.0] * len(scores)
    low, high = min(finite), max(finite)
    span = high / 2 - low / 2  # halves: the difference of two large numbers may be infinite
    if span <= 0.0:
        return [0.0] * len(scores)
    return [(min(score, high) / 2 - low / 2) / span for score in scores]


def softmax_choice(scores: Sequence[float], temperature: float, rng: random.Random) -> int:
    """A position drawn with probability ``exp(normalised score / temperature)``; equal scores: uniformly.

    ``temperature`` > 0, without a unit: at 1 the best is e times as likely as the worst. Raises
    :class:`StrategyError` for a score that is no finite number.
    """
    if not all(map(math.isfinite, scores)):
        raise StrategyError(f"costs {list(scores)} cannot be drawn by temperature: one is not finite")
    shares = normalised(scores)
    top = max(shares)
    weights = [math.exp((share - top) / temperature) for share in shares]
    return rng.choices(range(len(scores)), weights)[0]
