"""One child process of a gateway: started when it is first needed, one job at a time, ended at its budget.

Owns the child's life and the pipe to it. A job that outlives its budget ends the child and fails alone; the
next one has a new child. Knows no job from another.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Callable

import msgspec
import structlog

from microserve.gateway.helper.jobs import HEAD, RESULTS, Job, Result, Setup, encode
from microserve.protocol import log
from microserve.protocol.errors import CapacityError, MeshError

KEPT_ENVIRONMENT = ("PATH", "PYTHONPATH", "PYTHONHOME", "LD_LIBRARY_PATH", "LANG", "LC_ALL")
"""What else the environment holds (keys, say) is nothing for a model's template."""

_logger = structlog.get_logger()


BY_THE_JOB = frozenset({signal.SIGPROF, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS})
"""Ends of a child that its job has brought about: no CPU time left, no memory, no stack."""


class HelperDied(CapacityError):
    """The child ended before its answer. ``is_over_budget``: this job would be no different the next time."""

    def __init__(self, detail: str, *, is_over_budget: bool = False) -> None:
        super().__init__(detail, retry_after_s=1.0)
        self.is_over_budget = is_over_budget


class HelperProcess:
    """Use inside one event loop; ``close`` it."""

    def __init__(self, name: str, setup: Setup) -> None:
        self._name = name
        self._setup = setup
        self._process: Process | None = None
        self._turn = asyncio.Lock()
        self._ended: MeshError | None = None
        self._dying: set[asyncio.Task[int]] = set()
        """Waits for children that have been killed: each is reaped before the loop ends."""

    @property
    def pid(self) -> int | None:
        """Of the living child, if there is one."""
        return None if self._process is None else self._process.pid

    async def ask(
        self, job: Job, bulk: bytes = b"", *, wall_s: float, is_wanted: Callable[[], bool] | None = None
    ) -> tuple[Result, bytes] | None:
        """The answer and its bulk, in the order of asking; None when nobody wanted it any more at its turn.

        ``wall_s``: after so long the child is killed; its own budgets of CPU time end it earlier, mostly.
        Raises :class:`HelperDied`, or what :meth:`end` was given.
        """
        message = encode(job)  # what raises here has cost nobody a child
        async with self._turn:
            if self._ended is not None:
                raise self._ended
            if is_wanted is not None and not is_wanted():
                return None
            process = self._process = self._process or await self._start()
            done = False
            try:
                async with asyncio.timeout(wall_s):
                    answer = await self._exchange(process, message, bulk)
                done = True
                return answer
            except TimeoutError:
                raise await self._died(process, is_over_budget=True) from None
            except (OSError, asyncio.IncompleteReadError):
                raise self._ended or await self._died(process) from None
            finally:
                if not done:  # cancelled, too: what is left in the pipe is no answer to the next job
                    self._process = None
                    self._bury(process)

    async def _start(self) -> Process:
        environment = {name: os.environ[name] for name in KEPT_ENVIRONMENT if name in os.environ}
        setup = msgspec.json.encode(self._setup).decode()
        try:
            return await asyncio.create_subprocess_exec(
                *(sys.executable, "-P", "-m", "microserve.gateway.helper.main", setup),
                stdin=PIPE,
                stdout=PIPE,
                stderr=DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise HelperDied(f"no process can be started now: {error.strerror}") from None

    async def _exchange(self, process: Process, message: bytes, bulk: bytes) -> tuple[Result, bytes]:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(HEAD.pack(len(message), len(bulk)) + message)
        if bulk:
            process.stdin.write(bulk)
        await process.stdin.drain()
        num_message, num_bulk = HEAD.unpack(await process.stdout.readexactly(HEAD.size))
        answer = RESULTS.decode(await process.stdout.readexactly(num_message))
        return answer, await process.stdout.readexactly(num_bulk)

    async def _died(self, process: Process, *, is_over_budget: bool = False) -> HelperDied:
        """Why there is no answer; said in the log as well."""
        code = await asyncio.shield(self._bury(process))
        named = {number.value: number.name for number in signal.Signals}
        reason = "budget of time" if is_over_budget else named.get(-code, f"exit code {code}")
        _logger.warning(log.HELPER_ENDED, helper=self._name, pid=process.pid, reason=reason)
        return HelperDied(
            f"a helper of this gateway ended: {reason}", is_over_budget=is_over_budget or -code in BY_THE_JOB
        )

    def end(self, error: MeshError) -> None:
        """Nothing new from now on: what runs or waits raises ``error``."""
        self._ended = self._ended or error
        if self._process is not None:
            _kill(self._process)

    async def close(self) -> None:
        self.end(CapacityError("this gateway is shutting down", retry_after_s=1.0))
        process, self._process = self._process, None
        if process is not None:
            self._bury(process)
        await asyncio.gather(*self._dying, return_exceptions=True)

    def _bury(self, process: Process) -> asyncio.Task[int]:
        """Kill it, and wait for its exit code without holding anybody up."""
        _kill(process)
        dying = asyncio.create_task(process.wait(), name="helper's end")
        self._dying.add(dying)
        dying.add_done_callback(self._dying.discard)
        return dying


def _kill(process: Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        process.kill()
