"""Mailboxes: whatever is repeated or merged on the way, each token is taken once; a gap ends the sequence."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.http.errors import ClientGone
from microserve.gateway.routers.link import RouterLost
from microserve.gateway.routers.mailbox import Inbox, Mailbox
from microserve.protocol.errors import DeadlineExceeded, ProtocolViolation
from microserve.protocol.messages.engine import TokenLogprob, Usage
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from microserve.protocol.messages.router import Ended, Output, Phases
from tests.support.gateway.gateway_world import run

ENDED = Ended("length", Usage(), Phases(), "auto", [])


def make(
    max_tokens: int = 100, *, with_logprobs: bool = False, num_scored: int = 0
) -> tuple[Inbox, Mailbox, list[str]]:
    inbox, cancels = Inbox(), list[str]()
    mailbox = Mailbox(
        inbox,
        "r",
        0,
        max_tokens=max_tokens,
        with_logprobs=with_logprobs,
        num_scored=num_scored,
        cancel=lambda: cancels.append("r"),
    )
    return inbox, mailbox, cancels


@given(
    deliveries=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.booleans()), max_size=20),
    with_logprobs=st.booleans(),
)
def test_repeats_and_overlaps_bring_each_token_once(
    deliveries: list[tuple[int, int, bool]], with_logprobs: bool
) -> None:
    """A delivery begins so many tokens too early, brings so many new ones, and is taken at once or later."""
    _, mailbox, _ = make(with_logprobs=with_logprobs)
    taken: list[int] = []
    logprobs: list[float] = []

    def take() -> None:
        batch = mailbox.take()
        taken.extend(batch.token_ids)
        logprobs.extend(value.logprob for value in batch.logprobs)

    known = num_repeated = 0
    for early, new, taken_at_once in deliveries:
        begin, end = max(0, known - early), known + new
        values = [TokenLogprob(float(i)) for i in range(begin, end)] if with_logprobs else []
        mailbox.deliver(Output("r", begin, list(range(begin, end)), values), 0.0)
        num_repeated += known - begin
        known = end
        if taken_at_once:
            take()
    take()
    assert mailbox.failed is None
    assert mailbox.num_repeated == num_repeated
    assert taken == list(range(known))
    assert logprobs == ([float(i) for i in range(known)] if with_logprobs else [])
    assert mailbox.num_waiting == 0


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(Output("r", 3, [1]), id="gap"),
        pytest.param(Output("r", 2, [1] * 4), id="more than max_tokens"),
        pytest.param(Output("r", 2, [-1]), id="negative id"),
        pytest.param(Output("r", 2, [2**32]), id="33-bit id"),
    ],
)
def test_a_broken_stream_ends_the_sequence_and_is_cancelled(output: Output) -> None:
    _, mailbox, cancels = make(max_tokens=5)
    mailbox.deliver(Output("r", 0, [7, 8]), 0.0)
    mailbox.deliver(output, 0.0)
    assert isinstance(mailbox.failed, ProtocolViolation)
    assert cancels == ["r"]
    assert mailbox.take().token_ids == [7, 8]
    mailbox.deliver(Output("r", 2, [9], ended=ENDED), 0.0)
    assert mailbox.take().token_ids == []


def test_missing_logprobs_are_a_violation() -> None:
    _, mailbox, _ = make(with_logprobs=True)
    mailbox.deliver(Output("r", 0, [7, 8], [TokenLogprob(0.0)]), 0.0)
    assert isinstance(mailbox.failed, ProtocolViolation)


def test_the_handler_gets_what_came_merged_and_in_order() -> None:
    async def main() -> None:
        inbox, mailbox, _ = make()
        waiting = asyncio.create_task(inbox.wait())
        await asyncio.sleep(0)
        mailbox.deliver(Output("r", 0, [1]), 5.0)
        mailbox.deliver(Output("r", 1, [2, 3]), 6.0)
        mailbox.deliver(Output("r", 3, [], ended=ENDED), 7.0)
        assert await waiting == [mailbox]
        batch = mailbox.take()
        assert (batch.token_ids, batch.ended, mailbox.first_at) == ([1, 2, 3], ENDED, 5.0)

    run(main())


def test_what_came_before_a_lost_router_is_taken_first() -> None:
    async def main() -> None:
        inbox, mailbox, _ = make()
        mailbox.deliver(Output("r", 0, [1]), 0.0)
        mailbox.fail(RouterLost("gone"))
        assert await inbox.wait() == [mailbox]
        assert mailbox.take().token_ids == [1]
        assert isinstance(mailbox.failed, RouterLost)

    run(main())


def test_failing_the_inbox_cancels_everything_and_wakes_the_handler() -> None:
    async def main() -> None:
        inbox, mailbox, cancels = make()
        waiting = asyncio.create_task(inbox.wait())
        await asyncio.sleep(0)
        inbox.fail(ClientGone())
        inbox.fail(DeadlineExceeded())
        with pytest.raises(ClientGone):
            await waiting
        assert cancels == ["r"]
        inbox.cancel()
        assert cancels == ["r"]
        assert not mailbox.over

    run(main())


def test_a_finished_sequence_is_never_cancelled() -> None:
    _, mailbox, cancels = make()
    mailbox.deliver(Output("r", 0, [1], ended=ENDED), 0.0)
    mailbox.cancel()
    assert cancels == []


def test_settling_waits_for_the_end_and_not_for_ever() -> None:
    async def main() -> None:
        inbox, mailbox, _ = make()
        settling = asyncio.create_task(inbox.settle(20.0))
        await asyncio.sleep(0)
        mailbox.deliver(Output("r", 0, [], ended=ENDED), 0.0)
        await settling
        other, _, _ = make()
        await other.settle(0.01)

    run(main())


def test_a_poke_wakes_with_nothing() -> None:
    async def main() -> None:
        inbox, _, _ = make()
        waiting = asyncio.create_task(inbox.wait())
        await asyncio.sleep(0)
        inbox.poke()
        assert await waiting == []

    run(main())


def test_tokens_are_taken_at_once_while_somebody_waits_and_everything_else_wakes_him() -> None:
    async def main() -> None:
        inbox, mailbox, _ = make()
        taken: list[int] = []

        def take(mailbox: Mailbox) -> bool:
            if mailbox.over:
                return False
            taken.extend(mailbox.take().token_ids)
            return True

        inbox.take_at_once = take
        mailbox.deliver(Output("r", 0, [0]), 0.0)
        assert taken == []  # nobody waits yet
        assert await inbox.wait() == [mailbox]
        assert mailbox.take().token_ids == [0]

        waiting = asyncio.create_task(inbox.wait())
        await asyncio.sleep(0)
        mailbox.deliver(Output("r", 1, [1]), 0.0)
        mailbox.deliver(Output("r", 2, [2]), 0.0)
        await asyncio.sleep(0)
        assert taken == [1, 2] and not waiting.done()

        inbox.poke()
        mailbox.deliver(Output("r", 3, [3]), 0.0)  # he is on his way
        assert await waiting == [mailbox]
        assert mailbox.take().token_ids == [3]

        waiting = asyncio.create_task(inbox.wait())
        await asyncio.sleep(0)
        mailbox.deliver(Output("r", 4, [4], ended=ENDED), 0.0)
        assert await waiting == [mailbox]
        batch = mailbox.take()
        assert (batch.token_ids, batch.ended) == ([4], ENDED)

    run(main())


def rows(begin: int, end: int) -> PromptLogprobs:
    return packed(begin, 0, [PromptLogprob(-float(at), 1, ()) for at in range(begin, end)])


@given(deliveries=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 5), st.booleans()), max_size=20))
def test_repeated_rows_of_the_prompt_bring_each_once(deliveries: list[tuple[int, int, bool]]) -> None:
    _, mailbox, _ = make(num_scored=200)
    known, taken = 1, rows(1, 1)
    for early, new, at_once in deliveries:
        begin = max(1, known - early)
        mailbox.deliver(Output("r", 0, [], prompt=rows(begin, known + new)), 0.0)
        known += new
        assert mailbox.has_begun == (known > 1) and not mailbox.is_scored
        if at_once and (prompt := mailbox.take().prompt) is not None:
            taken = taken.joined(prompt)
    mailbox.deliver(Output("r", 0, [7], ended=ENDED, prompt=rows(1, 200)), 0.0)
    batch = mailbox.take()

    assert mailbox.failed is None and mailbox.is_scored and batch.prompt is not None
    assert (taken.joined(batch.prompt), batch.token_ids) == (rows(1, 200), [7])


@pytest.mark.parametrize(
    "output",
    [
        pytest.param(Output("r", 0, [], prompt=rows(5, 7)), id="gap"),
        pytest.param(Output("r", 0, [], prompt=rows(3, 9)), id="behind the prompt"),
        pytest.param(Output("r", 0, [], prompt=PromptLogprobs(3, 0, b"torn")), id="torn"),
        pytest.param(Output("r", 0, [], prompt=PromptLogprobs(3, 1, bytes(16))), id="another width"),
        pytest.param(Output("r", 0, [7], prompt=rows(3, 7)), id="a token before the last"),
        pytest.param(Output("r", 0, [], ended=ENDED), id="the end before the last"),
    ],
)
def test_rows_that_are_missing_or_wrong_are_a_violation(output: Output) -> None:
    _, mailbox, cancels = make(num_scored=8)
    mailbox.deliver(Output("r", 0, [], prompt=rows(1, 4)), 0.0)
    mailbox.deliver(output, 0.0)

    assert isinstance(mailbox.failed, ProtocolViolation) and cancels == ["r"]


def test_rows_that_nobody_asked_for_are_a_violation() -> None:
    _, mailbox, _ = make()
    mailbox.deliver(Output("r", 0, [], prompt=rows(1, 2)), 0.0)

    assert isinstance(mailbox.failed, ProtocolViolation)
