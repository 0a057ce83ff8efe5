"""What is read in an address, and what others are told of one that is bound."""

from __future__ import annotations

import pytest

from microserve.protocol.bus.address import announced, host_of, is_out_of_reach, own_host_towards

INDEX = "tcp://127.0.0.1:7100"
ELSEWHERE = "tcp://192.0.2.1:7100"
"""Of documentation's own network (RFC 5737): nobody's."""


@pytest.mark.parametrize(
    ("bound", "advertise", "told"),
    [
        ("tcp://10.0.0.2:7200", "", "tcp://10.0.0.2:7200"),
        ("tcp://0.0.0.0:7200", "", "tcp://127.0.0.1:7200"),
        ("tcp://[::]:7200", "", "tcp://127.0.0.1:7200"),
        ("tcp://0.0.0.0:7200", "gpu-1.example.org", "tcp://gpu-1.example.org:7200"),
        ("tcp://10.0.0.2:7200", "192.0.2.9", "tcp://192.0.2.9:7200"),
        ("tcp://0.0.0.0:7200", "2001:db8::7", "tcp://[2001:db8::7]:7200"),
        ("tcp://[::1]:7200", "[2001:db8::7]", "tcp://[2001:db8::7]:7200"),
        ("ipc:///run/engine", "10.0.0.2", "ipc:///run/engine"),
    ],
)
def test_what_is_told_of_a_socket_can_be_connected_to(bound: str, advertise: str, told: str) -> None:
    assert announced(bound, advertise, INDEX) == told


def test_the_way_to_loopback_begins_there() -> None:
    for address in (INDEX, "tcp://localhost:1", "tcp://0.0.0.0:7100", "ipc:///run/index"):
        assert own_host_towards(address) == "127.0.0.1"


def test_loopback_is_out_of_reach_of_others_and_of_nobody_here() -> None:
    assert not is_out_of_reach("tcp://127.0.0.1:0", INDEX)
    assert not is_out_of_reach("tcp://localhost:0", "ipc:///run/index")
    assert not is_out_of_reach("tcp://0.0.0.0:0", ELSEWHERE)
    assert not is_out_of_reach("tcp://127.0.0.1:0", "tcp://no-such-name.invalid:7100"), "unsure"
    own = None
    try:
        own = own_host_towards(ELSEWHERE)
    except OSError:
        pytest.skip("no way leads away from this machine")
    assert is_out_of_reach("tcp://127.0.0.1:0", ELSEWHERE)
    assert is_out_of_reach("tcp://localhost:0", ELSEWHERE)
    assert not is_out_of_reach("tcp://127.0.0.1:0", f"tcp://{own}:7100"), "the index is here, too"


def test_hosts_are_read_without_brackets() -> None:
    assert [host_of(each) for each in ("tcp://[::1]:1", "tcp://a.b:1", "ipc://x")] == ["::1", "a.b", ""]
