"""What ``strategy compare`` promises, in simulated runs that are looked at after every request."""

from __future__ import annotations

import pytest
from canary_traffic import Comparison, Traffic

from microserve.services.index.trial.comparison import NOT_YET
from microserve.services.index.trial.judging import judge

pytestmark = [pytest.mark.heavy]

NUM_RUNS = 100
NUM_REQUESTS = 400


def decided(traffic: Traffic, seed: int, count: int) -> dict[str, tuple[int, str]]:
    """By measure: after how many requests something was said, and what."""
    said: dict[str, tuple[int, str]] = {}
    for number, (ours, theirs) in enumerate(Comparison(traffic, seed).steps(count), 1):
        for name, result in judge(ours, theirs, traffic.share).items():
            if result.verdict != NOT_YET and name not in said:
                said[name] = (number, result.verdict)
    return said


@pytest.mark.parametrize("factor", [1.2, 1 / 1.2])
def test_a_difference_of_a_fifth_in_ttft_is_seen_within_400_requests(
    factor: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """200 a side: a canary of half of the requests."""
    verdict = "worse" if factor > 1 else "better"
    runs = [decided(Traffic(factor=factor), seed, NUM_REQUESTS) for seed in range(NUM_RUNS)]
    found = sorted(said["TTFT"][0] for said in runs if said.get("TTFT", (0, ""))[1] == verdict)
    with capsys.disabled():
        print(f"\n{verdict}: {len(found)} of {NUM_RUNS}, half within {found[len(found) // 2]} requests")
    assert len(found) >= 0.95 * NUM_RUNS


@pytest.mark.parametrize(
    "traffic",
    [Traffic(), Traffic(scatter=1.0), Traffic(share=0.1), Traffic(failing=(0.05, 0.05))],
    ids=["as above", "wild", "a tenth", "failing"],
)
def test_equals_are_called_equals(traffic: Traffic, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [decided(traffic, 1000 + seed, NUM_REQUESTS) for seed in range(NUM_RUNS)]
    alarms = [said for said in runs if said]
    with capsys.disabled():
        print(f"\nfalse alarms: {len(alarms)} of {NUM_RUNS}")
    assert len(alarms) <= 0.05 * NUM_RUNS
