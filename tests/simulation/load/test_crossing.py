"""``auto`` beside ``data_parallel`` in virtual time: better where two engines pay, nowhere much worse."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest

from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.load.point import TOKEN_PARAMETERS, run_point
from microserve.services.simulation.load.task import Point
from microserve.services.simulation.load.timing import PROFILES, Profile
from microserve.services.simulation.load.trace import drawn

WORSE = 1.05
"""Of ``data_parallel``'s mean JCT, what no strategy that is the default may take."""
STEP_TOKENS = 512
H200, CPU = PROFILES["h200-8b"], PROFILES["cpu"]
ROLES = (("prefill",), ("decode",))


def rate_of(profile: Profile, prompt_tokens: int, load: float, num_engines: int) -> float:
    """Requests a second whose prefills alone take the share ``load`` of all engines' time."""
    starts = range(0, prompt_tokens, STEP_TOKENS)
    prefill_s = sum(
        profile.step_s([(min(STEP_TOKENS, prompt_tokens - start), start)], []) for start in starts
    )
    return load * num_engines / prefill_s


def jct_s(
    strategy: str,
    profile: Profile,
    lengths: tuple[int, int],
    load: float,
    *,
    num_requests: int = 100,
    num_engines: int = 2,
    labels: tuple[tuple[str, ...], ...] = (),
    scale: int = 1,
    seed: int = 0,
) -> float:
    [found] = [each for each in BUILT_IN if each.name == strategy]
    counting = TOKEN_PARAMETERS.get(strategy, ())
    given = {name: max(1, found.bind({}).values[name] // scale) for name in counting}
    result = run_point(
        Point(
            strategy,
            "",
            rate_of(profile, lengths[0], load, num_engines),
            drawn(num_requests, *lengths, seed),
            profile,
            num_engines,
            labels,
            scale,
            seed,
            {strategy: given} if given else {},
            5.0,
            0.05,
        )
    )
    assert result.num_served == num_requests
    return result.jct_s.mean


def ratio(*point: object, **more: object) -> float:
    sides = [jct_s(name, *point, **more) for name in ("auto", "data_parallel")]  # type: ignore[arg-type]
    return sides[0] / sides[1]


@pytest.mark.parametrize(
    ("profile", "lengths", "load", "most"),
    [(CPU, (600, 20), 0.1, 0.9), (H200, (3000, 100), 0.6, 0.99)],
    ids=["prefill halved on idle engines", "decodes kept away from prefills"],
)
def test_two_engines_are_better_where_they_pay(
    profile: Profile, lengths: tuple[int, int], load: float, most: float
) -> None:
    assert ratio(profile, lengths, load) <= most


@pytest.mark.parametrize("labels", [(), ROLES], ids=["no labels", "labels"])
def test_near_saturation_nothing_is_lost(labels: tuple[tuple[str, ...], ...]) -> None:
    assert ratio(H200, (3000, 100), 0.85, num_requests=80, labels=labels) <= WORSE


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("profile", "lengths", "link_gbps"),
    [
        (H200, (3000, 100), 400),
        (H200, (3000, 100), 10),
        (H200, (400, 400), 400),
        (CPU, (600, 20), 400),
        (CPU, (400, 400), 10),
    ],
    ids=str,
)
def test_auto_is_nowhere_worse(profile: Profile, lengths: tuple[int, int], link_gbps: float) -> None:
    """Ratios of prompt to answer and links, at four loads; a mean of two seeds at each."""
    linked = replace(profile, link_nbytes_per_s=link_gbps * 1e9 / 8)
    worse = {}
    for load in (0.1, 0.4, 0.7, 0.9):
        found = [ratio(linked, lengths, load, num_requests=120, seed=seed) for seed in (0, 1)]
        if statistics.mean(found) > WORSE:
            worse[load] = found
    assert not worse
