"""The grant machine bites: bugs planted on purpose make it fail, within the examples of an ordinary run."""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from microserve.protocol.errors import MeshError
from tests.kvcache.grant.test_grant_machine import GrantMachine, TestGrants
from tests.simulation.mutation.mutations import planted

BUGS = [
    "Skip quarantine: a closed grant's blocks are free at once",
    "A layer counts as here when its first chunk is",
    "A writer never lets its lane go",
    "A sealed grant settles while a writer still holds its lane",
    "A late writer takes any open grant of the slot: the generation is not compared",
    "The frontier of two lanes is the furthest end, whatever lies before",
]
# The same examples each time, and the first that fails is enough.
ONCE = settings(
    TestGrants.settings,
    phases=[Phase.generate],
    database=None,
    derandomize=True,
    report_multiple_bugs=False,
)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    with planted(name), pytest.raises((AssertionError, MeshError)):
        run_state_machine_as_test(GrantMachine, settings=ONCE)
