"""The simulation bites: bugs planted on purpose are caught, each within the seeds that a quick look allows.

The whole list, with its table: ``make mutations``.
"""

from __future__ import annotations

import pytest

from tests.simulation.mutation.mutations import hunt
from tests.simulation.mutation.planting import MUTATIONS

QUICK = [
    "Skip quarantine: a closed grant's blocks are free at once",
    "Publish before arrival: a prefix is cached while its KV is still to come",
    "Forget Abort on one leg: the first engine of a request is not told that it has ended",
    "Lose the retry's offset: a continued request starts again from its prompt",
    "Count load without finally: a cancelled request's load stays in the book",
    "A moved request begins anew, and the client has its first tokens twice",
    "A lost router's requests stay with it, though they go on elsewhere",
    "A lost message is not noticed",
    "Ignore the incarnation: events of a new life are taken for the old one's",
    "A sealed grant settles while a writer still holds its lane",
    "A late writer takes any open grant of the slot: the generation is not compared",
    "The frontier of two lanes is the furthest end, whatever lies before",
    "A failed send stays on its target's book",
    "What an exact engine computes behind KV of another class becomes prefix cache",
    "A request that goes on at another router does not say in which class it began",
    "A grammar does not follow the tokens that another engine has delivered",
    "A row is given the mask of the row beside it",
    "A prompt that is computed again by another engine is told of once more from its first token",
    "A prompt is told of the token behind the wrong row where it is cut into chunks",
    "A request that must be computed by one engine is served as its strategy says",
]


@pytest.mark.parametrize("name", QUICK)
def test_a_planted_bug_is_caught(name: str) -> None:
    catch = hunt(name, limit=120)
    assert catch.seeds is not None, name
    assert catch.seen


def test_the_list_is_as_long_as_promised() -> None:
    assert len(MUTATIONS) >= 33
    assert set(QUICK) <= set(MUTATIONS)
