"""The short-term rule: its truth table, and how the threshold goes as the link goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.clusters.threshold import Route, Threshold

pytestmark = pytest.mark.quick


def rule(*, is_scarce: bool, tokens: float = 100.0) -> Threshold:
    threshold = Threshold(tokens)
    threshold.is_scarce = is_scarce
    return threshold


@pytest.mark.parametrize(
    ("is_scarce", "total", "local", "remote", "route"),
    [
        # Nothing cached: length alone decides, whatever the link is.
        (False, 100, 0, 0, Route(False, 100, 100, 0)),
        (False, 101, 0, 0, Route(True, 101, 101, 0)),
        (True, 100, 0, 0, Route(False, 100, 100, 0)),
        (True, 101, 0, 0, Route(True, 101, 101, 0)),
        # Cached here: both count it; computed there it would be copied, if there is a link to spare.
        (False, 300, 250, 0, Route(False, 50, 50, 0)),
        (True, 300, 250, 0, Route(False, 50, 50, 0)),
        (False, 300, 150, 0, Route(True, 150, 150, 150)),
        (True, 300, 150, 0, Route(True, 150, 300, 0)),
        # Cached there: abundant, it is copied to where it is computed; scarce, it counts only there.
        (False, 300, 0, 250, Route(False, 50, 50, 250)),
        (True, 300, 0, 250, Route(True, 300, 50, 0)),
        (False, 300, 0, 150, Route(True, 150, 150, 0)),
        (True, 300, 0, 150, Route(True, 300, 150, 0)),
        # In both: the better one is copied.
        (False, 300, 220, 260, Route(False, 40, 40, 260)),
        (True, 300, 220, 260, Route(False, 80, 80, 0)),
        (False, 300, 150, 180, Route(True, 120, 120, 0)),
        (True, 300, 150, 180, Route(True, 150, 120, 0)),
        (False, 300, 180, 150, Route(True, 120, 120, 180)),
        (True, 300, 150, 150, Route(True, 150, 150, 0)),
        (False, 300, 300, 300, Route(False, 0, 0, 0)),
    ],
)
def test_truth_table(is_scarce: bool, total: int, local: int, remote: int, route: Route) -> None:
    assert rule(is_scarce=is_scarce).route(total, local, remote) == route


def test_a_full_link_raises_the_threshold_a_free_one_lets_it_come_back() -> None:
    threshold = Threshold(1000.0)
    threshold.tick(0.86, 0.0)
    assert threshold.is_scarce
    assert threshold.tokens == pytest.approx(1100.0)
    threshold.tick(0.7, 0.2)  # between the bounds: as it is
    assert threshold.is_scarce
    assert threshold.tokens == pytest.approx(1100.0)
    threshold.tick(0.5, 0.2)
    assert not threshold.is_scarce
    assert threshold.tokens == pytest.approx(1089.0)
    for _ in range(100):
        threshold.tick(0.7, 0.2)
    assert not threshold.is_scarce
    assert threshold.tokens == 1000.0


def test_a_queue_that_shrinks_is_left_to_shrink() -> None:
    threshold = Threshold(1000.0)
    for queue_s in (2.0, 5.0, 5.0):
        threshold.tick(1.0, queue_s)
    assert threshold.tokens == pytest.approx(1331.0)
    for queue_s in (4.0, 3.0, 1.5):
        threshold.tick(1.0, queue_s)
        assert threshold.is_scarce
    assert threshold.tokens == pytest.approx(1331.0)
    threshold.tick(0.1, 0.6)  # less in use, but not gone: still scarce
    assert threshold.is_scarce
    threshold.tick(0.1, 0.4)
    assert not threshold.is_scarce


def test_another_plan_is_gone_to_bit_by_bit_up_and_down() -> None:
    threshold = Threshold(1000.0)
    threshold.aim(1015.0)
    threshold.tick(0.0, 0.0)
    assert threshold.tokens == pytest.approx(1010.0)
    threshold.tick(0.0, 0.0)
    assert threshold.tokens == 1015.0
    threshold.aim(0.0)
    for _ in range(1000):
        threshold.tick(0.0, 0.0)
    assert threshold.tokens == 0.0


@given(
    st.floats(0, 1e6),
    st.floats(1, 1e6),
    st.lists(st.tuples(st.floats(0, 2), st.floats(0, 100)), max_size=60),
)
def test_it_stays_between_its_plan_and_the_most(
    best: float, most: float, ticks: list[tuple[float, float]]
) -> None:
    threshold = Threshold(best, most=most)
    for used, queue_s in ticks:
        before = threshold.tokens
        threshold.tick(used, queue_s)
        assert best <= threshold.tokens <= max(best, most) + 1e-6
        assert threshold.tokens <= max(before, 64.0) * 1.1 + 1e-6


@given(st.booleans(), st.integers(1, 5000), st.data())
def test_no_route_counts_more_than_there_is(is_scarce: bool, total: int, data: st.DataObject) -> None:
    local, remote = (data.draw(st.integers(0, total)) for _ in range(2))
    route = rule(is_scarce=is_scarce).route(total, local, remote)
    assert 0 <= route.work <= total
    assert 0 <= route.uncached <= total
    assert route.copied in (0, local, remote)
    assert route.is_remote == (route.uncached > 100)
    if is_scarce:
        assert not route.copied
    else:
        assert route.work == total - max(local, remote), "what is cached anywhere is computed by nobody"
