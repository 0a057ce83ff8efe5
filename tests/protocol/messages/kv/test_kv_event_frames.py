"""Frames around KV events: what is published, and what is replayed in every form that engines use."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import InternalError, ProtocolViolation
from microserve.protocol.messages.kv.kv_events import (
    MAX_SEQ,
    Published,
    parse_published,
    parse_replay_answer,
    parse_replay_request,
    publish_frames,
    replay_answer,
    replay_end,
    replay_request,
)


def test_published_frames() -> None:
    frames = publish_frames("kv", 258, b"payload")
    assert frames == [b"kv", b"\x00\x00\x00\x00\x00\x00\x01\x02", b"payload"]
    assert parse_published(frames) == Published("kv", 258, b"payload")


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [b"kv", bytes(8)],
        [b"kv", bytes(8), b"", b""],
        [b"kv", bytes(7), b""],
        [b"\xff", bytes(8), b""],
        [b"kv", b"\xff" * 8, b""],
    ],
)
def test_bad_published_frames(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolViolation):
        parse_published(frames)


@pytest.mark.parametrize("seq", [-1, MAX_SEQ + 1])
def test_a_sequence_out_of_range_is_not_sent(seq: int) -> None:
    with pytest.raises(InternalError):
        publish_frames("kv", seq, b"")


def test_replay_frames() -> None:
    request = replay_request(5)
    assert request == [b"", b"\x00\x00\x00\x00\x00\x00\x00\x05"]
    assert parse_replay_request([b"peer", *request]) == (b"peer", 5)
    assert replay_answer(b"peer", "kv", 5, b"x") == [
        b"peer",
        b"",
        b"kv",
        b"\x00\x00\x00\x00\x00\x00\x00\x05",
        b"x",
    ]
    assert replay_end(b"peer") == [b"peer", b"", b"", b"\xff" * 8, b""]


SEQ = (5).to_bytes(8, "big")
END = b"\xff" * 8


@pytest.mark.parametrize(
    ("frames", "answer"),
    [
        pytest.param([b"peer", b"", b"kv", SEQ, b"x"], Published("kv", 5, b"x"), id="router"),
        pytest.param([b"peer", b"", SEQ, b"x"], Published("", 5, b"x"), id="router-without-topic"),
        pytest.param([b"", b"kv", SEQ, b"x"], Published("kv", 5, b"x"), id="dealer"),
        pytest.param([b"", b"", SEQ, b"x"], Published("", 5, b"x"), id="dealer-empty-topic"),
        pytest.param([b"", SEQ, b"x"], Published("", 5, b"x"), id="dealer-without-topic"),
        pytest.param([b"kv", SEQ, b"x"], Published("kv", 5, b"x"), id="req"),
        pytest.param([SEQ, b"x"], Published("", 5, b"x"), id="req-without-topic"),
        pytest.param([b"peer", b"", b"", END, b""], None, id="end"),
        pytest.param([b"peer", b"", END, b""], None, id="end-without-topic"),
        pytest.param([b"", b"", END, b""], None, id="end-at-dealer"),
        pytest.param([END, b""], None, id="end-at-req-without-topic"),
    ],
)
def test_replay_answers(frames: list[bytes], answer: Published | None) -> None:
    assert parse_replay_answer(frames) == answer


@pytest.mark.parametrize(
    "frames",
    [
        [],
        [SEQ],
        [b"peer", b"kv", SEQ, b"x"],
        [b"peer", b"x", b"kv", SEQ, b"x"],
        [b"", b"", b"kv", SEQ, b"x"],
        [b"peer", b"", b"kv", b"", SEQ, b"x"],
        [b"", b"kv", SEQ[1:], b"x"],
        [b"", b"\xff", SEQ, b"x"],
    ],
)
def test_bad_replay_answers(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolViolation):
        parse_replay_answer(frames)


@pytest.mark.parametrize(
    "frames", [[b"", SEQ], [b"peer", SEQ], [b"peer", b"x", SEQ], [b"", b"", SEQ], [b"peer", b"", END]]
)
def test_bad_replay_requests(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolViolation):
        parse_replay_request(frames)


@given(st.lists(st.binary(max_size=12), max_size=6))
def test_random_frames_never_raise_anything_else(frames: list[bytes]) -> None:
    for parse in (parse_published, parse_replay_request, parse_replay_answer):
        with contextlib.suppress(ProtocolViolation):
            parse(frames)
