"""Whose tasks are whose, and what a strategy's task may not do."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest

from microserve.services.router.oversight.author import AUTHOR, CANCEL_S, LOOKS, Author, keep_tasks


def test_a_task_that_wants_to_end_the_process_is_its_authors_fault() -> None:
    told: list[str] = []
    author = Author("mine", 1, on_stray=told.append)

    async def leave() -> None:
        raise SystemExit(3)

    async def run_by_it() -> None:
        AUTHOR.set(author)
        author_task = asyncio.create_task(leave())
        await asyncio.wait([author_task])

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        keep_tasks(loop)
        task = loop.create_task(run_by_it())
        with contextlib.suppress(SystemExit):  # asyncio lets it through; protocol/process/run.py goes on
            loop.run_until_complete(task)
        loop.run_until_complete(task)
    assert told == ["a task of it wanted to end the router: SystemExit"]
    assert not author.tasks


@pytest.mark.slow
def test_a_task_that_had_no_turn_to_end_in_is_nobodys_fault() -> None:
    """A router that was held up, by its machine say, has not seen for how long a task runs on."""
    told: list[str] = []
    author = Author("mine", 1, on_stray=told.append)

    async def ends_in_some_turns() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            for _ in range(5):
                await asyncio.sleep(0)

    async def run_by_it() -> None:
        AUTHOR.set(author)
        task = asyncio.create_task(ends_in_some_turns())
        await asyncio.sleep(0)
        author.end()
        time.sleep(CANCEL_S + 0.1)  # noqa: ASYNC251 - nobody has a turn
        await asyncio.wait([task])
        await asyncio.sleep(2 * CANCEL_S / LOOKS)

    with contextlib.closing(asyncio.new_event_loop()) as loop:
        keep_tasks(loop)
        loop.run_until_complete(run_by_it())
    assert told == []
    assert not author.tasks
