"""Grammars compiled off the step thread: a queue, few threads, a cache by content.

Owns threads, and how long they may take: no compilation can be broken off, so a thread that is stuck in one
is given up, another takes its place, and beyond ``MAX_STUCK`` of them grammars are refused until one comes
back. Knows no library: what compiles is handed in, and made when it is first needed.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from microserve.protocol.errors import InternalError, MeshError, QueueFull
from microserve.protocol.grammar.bounds import check_bounds
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.guidance.guide import Guide, Matcher

MAX_CACHED = 256
MAX_CACHED_NBYTES = 4 << 20
"""Of the grammars' texts; what is compiled takes some tens of times as much."""
MAX_QUEUED = 256
MAX_STUCK = 4
MAX_REPLAYED_AT_ONCE = 64
"""Output tokens that are taken in the caller's thread: a tenth of a millisecond."""
STACK_NBYTES = 64 << 20
"""Grammars may be deep, and a stack that is too short ends the process; memory is taken as it is used."""
NICE = 10
"""What is served already goes first: so much more than the process."""


class Compiler(Protocol):
    def compile(self, grammar: Grammar) -> Matcher:
        """Raises :class:`MeshError`."""


class Compilation:
    """A ``Guiding``: written by one thread of the pool, read by the engine's."""

    def __init__(
        self,
        params: SamplingParams,
        grammar: Grammar,
        output: Sequence[int],
        ends: frozenset[int],
        on_done: Callable[[], None],
    ) -> None:
        self.params, self.grammar, self.output, self.ends = params, grammar, output, ends
        self.on_done = on_done
        self.guide: Guide | None = None
        self.error: MeshError | None = None
        self.began_at: float | None = None
        self.is_done = False
        self.is_cancelled = False
        self.max_s = 0.0
        self.look: Callable[[], None] = lambda: None
        self.give_up: Callable[[Compilation], None] = lambda job: None

    def is_overdue(self, now: float) -> bool:
        self.look()  # whoever waits finds out, too, that the thread is stuck in a job that nobody waits for
        return self.is_late(now)

    def is_late(self, now: float) -> bool:
        began = self.began_at
        return not self.is_done and began is not None and now - began > self.max_s

    def cancel(self) -> None:
        self.is_cancelled = True
        self.give_up(self)


class GuidePool:
    """The ``Guides`` of one engine; ``close`` it."""

    def __init__(
        self,
        make_compiler: Callable[[], Compiler],
        vocab_size: int,
        *,
        max_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``make_compiler``: called once, in the pool; ``max_s``: for one grammar."""
        self._make_compiler = make_compiler
        self._compiler: Compiler | None = None
        self._making = threading.Lock()
        self._vocab_size = vocab_size
        self._max_s = max_s
        self._clock = clock
        self._changed = threading.Condition()
        self._queue: deque[Compilation] = deque()
        self._cache: OrderedDict[tuple[str, str], Matcher] = OrderedDict()
        self._cached_nbytes = 0
        self._working: dict[Compilation, threading.Thread] = {}
        self._worker: threading.Thread | None = None
        """Who takes from the queue."""
        self._num_stuck = 0
        self._closed = False

    def prepare(
        self, params: SamplingParams, output: Sequence[int], ends: frozenset[int], on_done: Callable[[], None]
    ) -> Compilation:
        grammar = params.grammar
        if grammar is None:
            raise InternalError("there is no grammar to prepare")
        job = Compilation(params, grammar, list(output), ends, on_done)
        with self._changed:
            compiled = self._cached(grammar)
            if compiled is None:
                check_bounds(grammar)
            if compiled is not None and len(output) <= MAX_REPLAYED_AT_ONCE:
                job.guide = self._guide(job, compiled.fork())
                job.is_done = True
                return job
            self._leave_stuck()
            if len(self._queue) >= MAX_QUEUED:
                raise QueueFull(f"{MAX_QUEUED} grammars wait already", retry_after_s=1.0)
            if self._num_stuck >= MAX_STUCK:
                raise QueueFull("grammars are compiled that take too long", retry_after_s=1.0)
            self._start()
            if self._worker is None:
                raise QueueFull("no thread can be started to compile a grammar", retry_after_s=1.0)
            job.max_s, job.look, job.give_up = self._max_s, self._look, self._give_up
            self._queue.append(job)
            self._changed.notify()
        return job

    def close(self) -> None:
        """No thread is waited for: one that is stuck would hold the engine's end up."""
        with self._changed:
            self._closed = True
            self._queue.clear()
            self._changed.notify_all()

    # --- with the lock held ------------------------------------------------------------------------

    def _start(self) -> None:
        if self._worker is not None or self._closed:
            return
        worker = threading.Thread(target=self._work, name="grammars", daemon=True)
        with _stack(STACK_NBYTES), suppress(RuntimeError):  # no thread, or no memory for its stack
            worker.start()
            self._worker = worker

    def _leave_stuck(self) -> None:
        """A thread that works at one job for too long is left to itself; others go on without it."""
        now = self._clock()
        if any(thread is self._worker and job.is_late(now) for job, thread in self._working.items()):
            self._worker = None
            self._num_stuck += 1
        if self._queue and self._num_stuck < MAX_STUCK:
            self._start()

    def _cached(self, grammar: Grammar) -> Matcher | None:
        key = (grammar.kind, grammar.text)
        compiled = self._cache.get(key)
        if compiled is not None:
            self._cache.move_to_end(key)
        return compiled

    def _keep(self, grammar: Grammar, compiled: Matcher) -> None:
        key = (grammar.kind, grammar.text)
        if key not in self._cache:
            self._cache[key] = compiled
            self._cached_nbytes += len(grammar.text)
        while len(self._cache) > MAX_CACHED or self._cached_nbytes > MAX_CACHED_NBYTES:
            (_, text), _ = self._cache.popitem(last=False)
            self._cached_nbytes -= len(text)

    def _guide(self, job: Compilation, matcher: Matcher) -> Guide:
        guide = Guide(matcher, job.params, job.ends, self._vocab_size)
        guide.follow(job.output)
        return guide

    # --- threads -----------------------------------------------------------------------------------

    def _look(self) -> None:
        """Comes with every step: not one that waits for a thread that is nice."""
        if self._changed.acquire(blocking=False):
            try:
                self._leave_stuck()
            finally:
                self._changed.release()

    def _give_up(self, job: Compilation) -> None:
        with self._changed:
            if job in self._queue:
                self._queue.remove(job)
            self._leave_stuck()

    def _work(self) -> None:
        _be_nice()
        me = threading.current_thread()
        while True:
            with self._changed:
                while not self._queue and not self._closed and self._worker is me:
                    self._changed.wait()
                if self._worker is not me:
                    self._num_stuck -= 1
                    return
                if self._closed:
                    return
                job = self._queue.popleft()
                self._working[job] = me
            try:
                self._do(job)
            except MeshError as error:
                job.error = error
            except BaseException as error:  # a panic of the library's is no Exception, and we are awaited
                job.error = InternalError(f"a grammar cannot be compiled: {error!r}"[:512])
            with self._changed:
                del self._working[job]
                job.is_done = True
            if not job.is_cancelled:
                job.on_done()

    def _do(self, job: Compilation) -> None:
        with self._making:
            compiler = self._compiler = self._compiler or self._make_compiler()
        job.began_at = self._clock()
        with self._changed:
            compiled = self._cached(job.grammar)
        if compiled is None:
            compiled = compiler.compile(job.grammar)
            with self._changed:
                self._keep(job.grammar, compiled)
        with self._changed:
            matcher = compiled.fork()
        job.guide = self._guide(job, matcher)


def compiler_of(directory: Path, vocab_size: int, ends: frozenset[int]) -> Compiler:
    """By llguidance, which is imported here: most engines never see a grammar. Raises
    :class:`MeshError`."""
    from microserve.services.engine.guidance.matching import GrammarCompiler

    return GrammarCompiler(directory, vocab_size, ends)


class _stack:
    """Threads that are started inside have a stack of so many bytes."""

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes

    def __enter__(self) -> None:
        self._before = threading.stack_size(self._nbytes)

    def __exit__(self, *_: object) -> None:
        threading.stack_size(self._before)


def _be_nice() -> None:
    """On Linux a thread has a niceness of its own."""
    if sys.platform == "linux":
        with suppress(OSError):
            me = threading.get_native_id()
            os.setpriority(os.PRIO_PROCESS, me, os.getpriority(os.PRIO_PROCESS, me) + NICE)
