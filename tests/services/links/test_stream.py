"""Deltas in, tokens out: in order, once, merged; gaps and failures end the stream."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.errors import CacheFull, MeshError, PeerError, TransferFailed
from microserve.protocol.messages.engine import Delta, Finished, Timings, TokenLogprob, Usage
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from microserve.services.links.stream import Tokens, TokenStream
from tests.support.router.router_world import in_loop

OUTPUT = list(range(100, 140))


def delta(begin: int, end: int, *, reason: str = "", code: str = "", logprobs: bool = False) -> Delta:
    finished = Finished(reason, Usage(), Timings(), code=code) if reason else None
    values = [TokenLogprob(-float(i)) for i in range(begin, end)] if logprobs else []
    return Delta("r", begin, OUTPUT[begin:end], values, finished)


async def drain(stream: TokenStream) -> tuple[list[int], list[Tokens]]:
    chunks: list[Tokens] = []
    while not chunks or chunks[-1].finished is None:
        chunk = await stream.next()
        assert chunk.offset == sum(len(c.token_ids) for c in chunks)
        chunks.append(chunk)
    return [token for chunk in chunks for token in chunk.token_ids], chunks


@given(
    cuts=st.lists(st.integers(1, 39), max_size=8),
    repeats=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=10),
    first=st.booleans(),
    seed=st.randoms(use_true_random=False),
)
def test_any_mix_of_duplicates_gives_each_token_once(
    cuts: list[int], repeats: list[tuple[int, int]], first: bool, seed: object
) -> None:
    async def main() -> None:
        stream = TokenStream("r", "e", await_first=first)
        borders = sorted({0, 40, *cuts})
        told = 0
        for begin, end in itertools.pairwise(borders):
            stream.push(delta(begin, end, logprobs=True))
            told = end
            for low, high in repeats:
                if low <= high <= told:
                    stream.push(delta(low, high, logprobs=True))
        if first:
            stream.push_first(OUTPUT[0], TokenLogprob(-0.0))
            stream.push_first(999, None)
        stream.push(delta(40, 40, reason="length"))
        tokens, chunks = await drain(stream)
        assert tokens == OUTPUT
        logprobs = [value.logprob for chunk in chunks for value in chunk.logprobs]
        assert logprobs == [-float(i) for i in range(40)]

    asyncio.run(main())


@in_loop
async def test_waiting_tokens_merge_into_one_chunk() -> None:
    stream = TokenStream("r", "e")
    for position in range(10):
        stream.push(delta(position, position + 1))
    chunk = await stream.next()
    assert (chunk.offset, chunk.token_ids) == (0, OUTPUT[:10])


@in_loop
async def test_a_gap_fails_after_the_tokens_before_it() -> None:
    stream = TokenStream("r", "e")
    stream.push(delta(0, 2))
    stream.push(delta(3, 4))
    assert (await stream.next()).token_ids == OUTPUT[:2]
    with pytest.raises(PeerError, match=r"lost output tokens \[2, 3\)"):
        await stream.next()


@pytest.mark.parametrize("bad", [Delta("r", -1, [5]), Delta("r", 0, [5, 6], [TokenLogprob(0.0)])])
def test_a_malformed_delta_fails(bad: Delta) -> None:
    async def main() -> None:
        stream = TokenStream("r", "e")
        stream.push(bad)
        with pytest.raises(PeerError, match="malformed"):
            await stream.next()

    asyncio.run(main())


@in_loop
async def test_the_first_token_is_waited_for_and_goes_first() -> None:
    stream = TokenStream("r", "e", await_first=True)
    stream.push(delta(0, 3))  # token 0 of the decode engine itself is a duplicate
    reader = asyncio.create_task(stream.next())
    await asyncio.sleep(0)
    assert not reader.done()
    assert stream.started
    stream.push_first(7, None)
    chunk = await reader
    assert (chunk.offset, chunk.token_ids) == (0, [7, *OUTPUT[1:3]])


@in_loop
async def test_a_stream_that_ends_before_its_first_token_came_still_fails_with_the_send() -> None:
    stream = TokenStream("r", "e", await_first=True)
    stream.push(delta(1, 1, reason="length"))
    stream.fail(TransferFailed("poisoned"))
    with pytest.raises(TransferFailed):
        await stream.next()


@in_loop
async def test_the_engines_error_comes_after_its_tokens() -> None:
    stream = TokenStream("r", "e")
    stream.push(delta(0, 2))
    stream.push(delta(2, 2, reason="error", code="cache_full"))
    chunk = await stream.next()
    assert chunk.token_ids == OUTPUT[:2]
    assert chunk.finished is None
    with pytest.raises(CacheFull):
        await stream.next()


@in_loop
async def test_an_abort_that_nobody_asked_for_is_an_error() -> None:
    stream = TokenStream("r", "e")
    stream.push(delta(0, 0, reason="abort"))
    with pytest.raises(PeerError):
        await stream.next()


@in_loop
async def test_nothing_comes_after_the_end_or_a_failure() -> None:
    stream = TokenStream("r", "e")
    stream.push(delta(0, 1, reason="stop"))
    stream.push(delta(1, 3))
    stream.fail(MeshError("late"))
    chunk = await stream.next()
    assert chunk.token_ids == OUTPUT[:1]
    assert chunk.finished is not None


# --- rows of the prompt ------------------------------------------------------------------------------


def rows(begin: int, end: int) -> PromptLogprobs:
    return packed(begin, 0, [PromptLogprob(-float(at), 1, ()) for at in range(begin, end)])


@given(
    pieces=st.lists(st.tuples(st.integers(1, 20), st.integers(0, 20), st.booleans()), max_size=12),
    is_told=st.booleans(),
)
def test_rows_come_once_and_in_order_however_they_are_repeated_and_merged(
    pieces: list[tuple[int, int, bool]], is_told: bool
) -> None:
    """A piece begins so many rows too early, brings so many, and is taken at once or later."""

    async def main() -> None:
        stream, taken = TokenStream("r", "e"), rows(1, 1)
        told: list[Tokens] = []
        if is_told:
            stream.tell(told.append)
        known = 1
        for early, count, at_once in pieces:
            begin = max(1, known - early)
            stream.push(Delta("r", 0, [], prompt=rows(begin, begin + count)))
            known = max(known, begin + count)
            if at_once and stream.is_ready:
                told.append(await stream.next())
        stream.push(Delta("r", 0, [7], prompt=rows(known, known + 1)))
        stream.push(Delta("r", 1, [], [], Finished("length", Usage(), Timings())))
        while not told or told[-1].finished is None:
            told.append(await stream.next())
        for chunk in told:
            taken = taken if chunk.prompt is None else taken.joined(chunk.prompt)
            assert chunk.prompt is None or chunk.offset == 0, "before tokens, or with the first"
        assert taken == rows(1, known + 1)

    in_loop(main)()


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        (rows(6, 8), "lost log-probabilities"),
        (PromptLogprobs(5, 0, b"torn"), "malformed"),
        (PromptLogprobs(5, 1, bytes(16)), "malformed"),
        (PromptLogprobs(0, 0, bytes(8)), "malformed"),
    ],
)
@in_loop
async def test_rows_that_are_lost_or_torn_end_the_stream(prompt: PromptLogprobs, said: str) -> None:
    stream = TokenStream("r", "e")
    stream.push(Delta("r", 0, [], prompt=rows(1, 5)))
    stream.push(Delta("r", 0, [], prompt=prompt))
    assert (await stream.next()).prompt == rows(1, 5)
    with pytest.raises(PeerError, match=said):
        await stream.next()
