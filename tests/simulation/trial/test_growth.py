"""What a strategy keeps for ever, and what bounds it."""

from __future__ import annotations

import pytest

from microserve.services.simulation.trial.growth import told_growth

GROWS = "async def mine(mesh, request):\n    mesh.state.setdefault('seen', []).append(request.request_id)\n"


@pytest.mark.parametrize(
    "beside",
    [
        "engines[n % len(engines)]",
        "n = (n + 1) % len(engines)",
        "mesh.note('%s' % n)",
        "place = table[n % 8]",
    ],
)
def test_a_turn_and_a_text_bound_nothing(beside: str) -> None:
    [found] = told_growth(40, 40, {"__init__.py": f"{GROWS}    {beside}\n"})
    assert (found.mistake, found.line) == ("memory", 2)


@pytest.mark.parametrize(
    "bound",
    [
        *("table[n % 8] = n", "n = (n + 1) % 64", "mesh.state['seen'].clear()", "heappop(heap)"),
        *("kept = deque(maxlen=most)", "mesh.state['seen'] = mesh.state['seen'][-most:]"),
        "if len(mesh.state['seen']) > most: mesh.state['seen'] = []",
    ],
)
def test_where_something_may_be_forgotten_nothing_is_told(bound: str) -> None:
    assert told_growth(40, 40, {"__init__.py": f"{GROWS}    {bound}\n"}) == []


@pytest.mark.parametrize(
    "beside", ["if len(mesh.engines()) < 2: pass", "deque(maxlen=None)", "request.tokens[:9]"]
)
def test_what_looks_like_a_bound_is_none(beside: str) -> None:
    assert told_growth(40, 40, {"__init__.py": f"{GROWS}    {beside}\n"}) != []
