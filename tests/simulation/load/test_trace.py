"""Trace files: what is read, what is refused and how, and prompts that share what the trace shares."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import ConfigError
from microserve.services.simulation.load.trace import TraceRequest, arrivals, read_trace

CUT = Path(__file__).parents[3] / "tests/data/mooncake_conversation_2000.jsonl.gz"
GOOD = b'{"timestamp": 3000, "input_length": 700, "output_length": 5, "hash_ids": [0, 7]}\n'

Write = Callable[[bytes], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(content: bytes) -> Path:
        path = tmp_path / "trace.jsonl"
        path.write_bytes(content)
        return path

    return write


def test_the_cut_that_comes_with_the_project_is_read() -> None:
    requests = read_trace(CUT)
    assert len(requests) == 2000
    assert requests[0] == TraceRequest(0.0, 6758, 500, tuple(range(14)))
    assert max(request.num_tokens for request in requests) > 100_000
    assert read_trace(CUT, 10) == requests[:10]
    short = read_trace(CUT, 10, 4096)
    assert len(short) == 10
    assert all(request.num_tokens <= 4096 for request in short)


def test_plain_and_compressed_read_alike(write: Write) -> None:
    plain = read_trace(write(GOOD + b"\n" + GOOD))
    assert plain == read_trace(write(gzip.compress(GOOD + GOOD, mtime=0)))
    assert plain == [TraceRequest(3.0, 700, 5, (0, 7))] * 2


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (GOOD + b"{", "line 2: .*truncated"),
        (GOOD + GOOD.replace(b"700", b'"700"'), r"line 2: Expected `int`, got `str` - at `\$.input_length`"),
        (GOOD.replace(b"700", b"0"), r"line 1: .*>= 1.*input_length"),
        (GOOD.replace(b"3000", b"-1"), r"line 1: .*>= 0.*timestamp"),
        (GOOD.replace(b"[0, 7]", b"[0, -7]"), r"line 1: .*hash_ids"),
        (b'{"timestamp": 1, "input_length": 1}', "line 1: .*missing required field `output_length`"),
        (GOOD.replace(b"[0, 7]", b"[0]"), "line 1: 1 hash_ids, an input_length of 700 has 2 blocks"),
        (GOOD + GOOD.replace(b"3000", b"2"), "line 2: timestamp 2 is before the last"),
        (GOOD.replace(b"}", b', "attributes": {"tenant": "t"}}'), "line 1: attributes: tenant has a field"),
        (GOOD.replace(b"}", b', "priority": 101}'), r"line 1: .*<= 100.*priority"),
        (b"\xff\xfe", "line 1: "),
        (b"", "has no such requests"),
        (gzip.compress(GOOD, mtime=0)[:30], "cannot read"),
    ],
)
def test_a_bad_line_is_named(write: Write, content: bytes, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_trace(write(content))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*nothing: No such file"):
        read_trace(tmp_path / "nothing")


@given(
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
    st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6),
    st.sampled_from((1, 8, 128)),
)
def test_prompts_share_exactly_the_blocks_that_the_trace_shares(
    one: list[int], other: list[int], scale: int
) -> None:
    size = 512 // scale

    def blocks(ids: list[int]) -> list[list[int]]:
        tokens = TraceRequest(0.0, 512 * len(ids), 1, tuple(ids)).prompt(scale)
        assert len(tokens) == size * len(ids)
        assert all(0 <= token < 1 << 17 for token in tokens)
        return [tokens[at : at + size] for at in range(0, len(tokens), size)]

    for mine, my_block in zip(one, blocks(one), strict=True):
        for its, its_block in zip(other, blocks(other), strict=True):
            assert (my_block == its_block) is (mine == its)


def test_lengths_are_scaled() -> None:
    request = TraceRequest(0.0, 700, 18, (0, 7))
    assert [len(request.prompt(scale)) for scale in (1, 8, 128)] == [700, 87, 5]
    # One token, then 17 more: 3 times 8 hold them.
    assert [request.num_steps(scale) for scale in (1, 8, 128)] == [18, 4, 2]


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=200).map(sorted),
    st.floats(0.01, 100.0),
    st.integers(0, 3),
)
def test_arrivals_come_in_order_and_at_the_load(ticks: list[int], load: float, seed: int) -> None:
    requests = [TraceRequest(3.0 * tick, 1, 1, (0,)) for tick in ticks]
    times = arrivals(requests, load, seed)
    assert times == sorted(times) == arrivals(requests, load, seed)
    assert len(times) == len(ticks)
    assert times[0] >= 0.0 and times[-1] <= len(ticks) / load * (1 + 1e-9)


def test_a_line_may_say_who_asks(write: Write) -> None:
    said = b', "tenant": "t", "priority": -2, "attributes": {"user": "u", "header.x-tier": "gold"}}'
    [request] = read_trace(write(GOOD.replace(b"}", said)))
    assert (request.tenant, request.priority) == ("t", -2)
    assert dict(request.attributes) == {"user": "u", "header.x-tier": "gold"}
