"""Aborts are repeated until they are confirmed, and never at the cost of a newer attempt."""

from __future__ import annotations

from microserve.services.links.abort import Aborts


def test_an_abort_is_due_until_it_is_confirmed() -> None:
    aborts = Aborts()
    aborts.sent(1, "a", 10.0)
    aborts.sent(2, "b", 11.0)
    assert aborts.take_due(10.5) == ["a"]
    assert len(aborts) == 1, "the repeated one is sent under a new call id"
    assert aborts.confirm(2)
    assert not aborts.confirm(2)
    assert aborts.take_due(99.0) == []


def test_a_request_that_is_there_again_is_left_in_peace() -> None:
    """Its abort came before the new attempt, or the connection has ended: repeated, it would end that."""
    aborts = Aborts()
    aborts.sent(1, "a", 10.0)
    assert aborts.take_due(11.0, {"a"}) == []
    assert aborts.take_due(11.0, {"b"}) == ["a"]
