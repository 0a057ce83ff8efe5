"""Whose tasks are whose, and what a strategy's task may not do."""

from __future__ import annotations

import asyncio
import contextlib

from microserve.services.router.oversight.author import AUTHOR, Author, keep_tasks


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
