"""Whoever has one name of a request finds the others: the client's, the body's, those on the bus."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.request_id import is_named, moved, of_choice, unique
from microserve.protocol.types import MAX_REQUEST_ID_CHARS

CLIENTS = st.from_regex(r"[A-Za-z0-9._:/+=@-]{1,128}", fullmatch=True)
"""What a gateway takes for a client's own name (``gateway/http/exchange.py``)."""


@given(CLIENTS, st.integers(0, 127), st.integers(0, 99))
def test_every_name_of_a_request_is_known_as_one(client: str, index: int, num_moves: int) -> None:
    own = unique(client)
    choice = of_choice(own, index)
    last = moved(choice, num_moves) if num_moves else choice
    assert len(last) <= MAX_REQUEST_ID_CHARS
    for wanted in (client, own, choice, last, f"cmpl-{own}", f"chatcmpl-{own}", f"resp_{own}"):
        assert is_named(last, wanted), wanted


@given(CLIENTS, CLIENTS, st.integers(0, 9))
def test_another_client_s_request_is_not(client: str, other: str, index: int) -> None:
    bus = of_choice(unique(client), index)
    if client[:64] != other[:64] and not bus.startswith(other):
        assert not is_named(bus, other)
    assert not is_named(bus, f"{client[:60]}x") or client[:60] + "x" == client
    assert unique(client) != unique(client)
