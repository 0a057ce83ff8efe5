"""The rate of a link is what transfers over it had, and nothing else."""

from __future__ import annotations

import pytest

from microserve.kvcache.codec.choice.links import MAX_LINKS, MIN_SAMPLE_NBYTES, LinkMonitor

MB = 1_000_000


def test_a_rate_is_bytes_by_the_time_in_which_some_were_under_way() -> None:
    links = LinkMonitor()
    assert links.goodput("a") == 0.0
    links.sent("a", 10 * MB, 2.0)
    assert links.goodput("a") == 5 * MB and links.goodput("b") == 0.0


def test_what_is_not_the_links_is_no_sample() -> None:
    links = LinkMonitor()
    links.sent("a", 10 * MB, 2.0, was_bound=False)
    links.sent("a", MIN_SAMPLE_NBYTES - 1, 2.0)
    links.sent("a", 10 * MB, 0.0)
    links.sent("a", 10 * MB, float("inf"))
    links.sent("a", 10 * MB, float("nan"))
    assert links.goodput("a") == 0.0


@pytest.mark.parametrize(("before", "after"), [(100 * MB, MB), (MB, 100 * MB)])
def test_one_that_stalled_says_nothing_and_three_are_believed(before: int, after: int) -> None:
    links = LinkMonitor()
    for _ in range(10):
        links.sent("a", before, 1.0)
    links.sent("a", after, 1.0)
    links.sent("a", after, 1.0)
    assert links.goodput("a") == before
    links.sent("a", after, 1.0)
    assert links.goodput("a") == after


def test_links_are_bounded_and_the_longest_unused_goes() -> None:
    links = LinkMonitor()
    for number in range(MAX_LINKS + 1):
        links.sent(f"to-{number}", MB, 1.0)
        links.sent("to-0" if number < MAX_LINKS else "to-1", MB, 1.0)
    links.check_integrity()
    assert links.goodput("to-0") == MB and len(links.goodputs(1000)) == MAX_LINKS
    assert list(links.goodputs(2)) == ["to-1", f"to-{MAX_LINKS}"]
    links.forget("to-1")
    links.forget("nobody")
    assert links.goodput("to-1") == 0.0
