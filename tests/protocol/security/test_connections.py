"""What a connection may hold, decided from readings alone."""

from __future__ import annotations

import pytest

from microserve.protocol.security.connections import Connections, Gate, Limits

LIMITS = Limits(
    frame_nbytes=100, first_nbytes=50, unfinished_nbytes=200, queued_nbytes=1000, num_connections=3
)


class World:
    """A socket with connections, and what the kernel and the reader say of them."""

    def __init__(self, connections: Connections | None = None) -> None:
        self.connections = Connections() if connections is None else connections
        self.gate = Gate("g", LIMITS)
        self.received: dict[int, int] = {}
        self.handed: dict[int, int] = {}

    def open(self, *descriptors: int) -> list[int]:
        verdicts = [self.connections.opened(fd, self.gate, f"peer {fd}") for fd in descriptors]
        self.received |= dict.fromkeys(descriptors, 0)
        return [each.descriptor for each in verdicts if each is not None]

    def step(
        self, received: dict[int, int], handed: dict[int, int], *, is_drained: bool
    ) -> list[tuple[int, str]]:
        """So much more came, and was handed over, and nothing whole was left; who has to go, and why."""
        for fd, nbytes in received.items():
            self.received[fd] += nbytes
        for fd, nbytes in handed.items():
            self.handed[fd] = self.handed.get(fd, 0) + nbytes
        self.gate.num_drained += is_drained
        return [(each.descriptor, each.why) for each in self.connections.judge(self.received, self.handed)]


def test_who_has_said_nothing_whole_may_hold_little() -> None:
    world = World()
    world.open(1)
    assert world.step({1: 50}, {}, is_drained=True) == []
    assert world.step({1: 1}, {}, is_drained=False) == [(1, "first")]


def test_a_message_without_an_end_is_told_from_messages_that_wait() -> None:
    world = World()
    world.open(1)
    world.step({1: 40}, {1: 40}, is_drained=True)
    assert world.step({1: 500}, {}, is_drained=False) == [], "whole messages, for all we know"
    assert world.step({1: 0}, {}, is_drained=True) == [], "libzmq may not have read it yet"
    world.step({1: 0}, {}, is_drained=False)
    assert world.step({1: 0}, {}, is_drained=True) == [(1, "unfinished")]


def test_messages_that_wait_have_a_bound_too() -> None:
    world = World()
    world.open(1)
    for _ in range(2):
        world.step({1: 0}, {1: 1}, is_drained=True)
    assert world.step({1: 1000}, {}, is_drained=False) == []
    assert world.step({1: 1}, {}, is_drained=False) == [(1, "queued")]


@pytest.mark.parametrize("framing", [0.8, 1.0, 1.2])
def test_a_peer_that_completes_its_messages_stays_for_ever(framing: float) -> None:
    """What is handed over is known without the framing, or with too much of it: that must not add up."""
    world = World()
    world.open(1)
    for _ in range(10_000):
        assert world.step({1: 40}, {1: int(40 * framing)}, is_drained=True) == []


def test_who_completes_one_message_and_then_none_is_found() -> None:
    world = World()
    world.open(1)
    verdicts = []
    for _ in range(20):
        world.step({1: 30}, {1: 30}, is_drained=True)
    for _ in range(10):
        verdicts += world.step({1: 60}, {}, is_drained=True)
    assert verdicts[:1] == [(1, "unfinished")]


def test_a_total_is_kept_by_who_holds_most() -> None:
    world = World(Connections(max_total_nbytes=1500))
    world.open(1, 2, 3)
    world.step(dict.fromkeys((1, 2, 3), 10), dict.fromkeys((1, 2, 3), 10), is_drained=True)
    assert world.step({1: 400, 2: 900, 3: 500}, {}, is_drained=False) == [(2, "total")]


def test_strangers_have_a_total_of_their_own() -> None:
    world = World(Connections(max_strangers_nbytes=100))
    world.open(1, 2, 3)
    world.step({3: 10}, {3: 10}, is_drained=True)
    assert world.step({1: 40, 2: 49, 3: 190}, {}, is_drained=False) == []
    world.open(4)
    assert world.step({4: 45}, {}, is_drained=False) == [(2, "strangers")]


def test_beyond_the_number_the_oldest_that_has_said_nothing_goes() -> None:
    world = World()
    world.open(1, 2, 3)
    world.step({1: 10}, {1: 10}, is_drained=True)
    assert world.open(4) == [2]
    world.connections.closed(2)
    world.step(dict.fromkeys((3, 4), 10), dict.fromkeys((3, 4), 10), is_drained=True)
    assert world.open(5) == [5], "all others are known"


def test_a_number_that_is_used_again_begins_anew() -> None:
    world = World()
    world.open(1)
    world.step({1: 500}, {1: 500}, is_drained=True)
    world.connections.closed(1)
    world.handed.clear()
    world.open(1)
    assert world.step({1: 51}, {}, is_drained=False) == [(1, "first")]
    assert [each.peer for each in world.connections.of(world.gate)] == ["peer 1"]
