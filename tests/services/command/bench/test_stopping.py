"""Ctrl-C while a load runs: a word, no figures, and no process is left."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest

from tests.services.command.client.test_http import run
from tests.support.command.scripted_server import Asked, scripted_server
from tests.support.command.terminal import CONTROL_C, microserve_at_terminal


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_part_of_a_run_is_not_reported(tmp_path: Path, processes: int) -> None:
    async def main() -> None:
        asked = asyncio.Event()

        async def answer(request: Asked) -> None:
            if request.path == "/tokenize":
                return await request.reply(404, {})
            asked.set()
            await asyncio.Event().wait()
            return None

        async with scripted_server(answer) as server:
            words = ("bench", "--url", server.endpoint.url, "--warmup", "0", "--processes", str(processes))
            async with microserve_at_terminal(*words, home=tmp_path) as terminal:
                await asked.wait()
                children = psutil.Process(terminal.process.pid).children()
                assert len(children) == (processes if processes > 1 else 0)
                terminal.type(CONTROL_C)
                await terminal.expect("stopped; a part of a run is not reported")
                assert await terminal.end() == 130
                assert b"Traceback" not in terminal.shown and b"Benchmark" not in terminal.shown
                psutil.wait_procs(children, timeout=30)
                assert not any(child.is_running() for child in children)
            for each in server.asked:
                each.cut()

    run(main())
