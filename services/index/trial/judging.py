"""All measures of two versions together: what is said of each, and what may follow from it. Sans-I/O."""

from __future__ import annotations

from microserve.protocol.messages.strategy.scores import Side
from microserve.services.index.trial.comparison import BETTER, WORSE, Result, compare_times
from microserve.services.index.trial.failures import compare_failures

ALPHA = 0.05
"""Of all comparisons of two equals the share in which any measure is ever called better or worse."""
SPENT = {"TTFT": 0.4, "TPOT": 0.2, "JCT": 0.2, "failures": 0.2}
"""How the measures share ``ALPHA``."""
MARGIN = 1.05
"""What is slower by less is not worse."""


def judge(ours: Side, theirs: Side, share: float, alpha: float = ALPHA) -> dict[str, Result]:
    """By measure, ``ours`` over ``theirs``. ``share``: of the requests, those that are dealt to us."""
    return {
        **{
            name: compare_times(one, other, alpha * SPENT[name])
            for name, one, other in (
                ("TTFT", ours.ttft, theirs.ttft),
                ("TPOT", ours.tpot, theirs.tpot),
                ("JCT", ours.jct, theirs.jct),
            )
        },
        "failures": compare_failures(
            (ours.num_failed, ours.num_requests),
            (theirs.num_failed, theirs.num_requests),
            share,
            alpha * SPENT["failures"],
        ),
    }


def why_worse(results: dict[str, Result]) -> str:
    """What speaks for taking it back; empty: nothing. More time for each token is the price of a strategy
    that batches more: the whole of the request counts, in ``JCT``."""
    for name in ("failures", "TTFT", "JCT"):
        result = results[name]
        if result.verdict == WORSE:
            return f"{name} {result.ratio:.2f} times that beside it ({result.low:.2f} to {result.high:.2f})"
    return ""


def is_better(results: dict[str, Result]) -> bool:
    """In what clients wait for, and in nothing worse."""
    return not why_worse(results) and any(results[name].verdict == BETTER for name in ("TTFT", "JCT"))


def is_not_worse(results: dict[str, Result]) -> bool:
    """By more than ``MARGIN``."""
    return not why_worse(results) and all(results[name].is_not_worse(MARGIN) for name in ("TTFT", "JCT"))
