"""Grammars are compiled off the caller's thread; one that never ends costs its own request only."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from microserve.protocol.errors import InternalError, InvalidRequest, QueueFull
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.guidance.guide import Mask, Matcher, full
from microserve.services.engine.guidance.pool import MAX_CACHED, MAX_STUCK, Compilation, GuidePool

TIMEOUT_S = 20.0
ENDS = frozenset({1})


class Anything:
    """A matcher that allows all of 40 tokens."""

    def mask(self) -> Mask:
        return full(40)

    def may_end(self) -> bool:
        return True

    def take(self, token_id: int) -> None:
        if token_id == 13:
            raise InternalError("13 is not in the grammar")

    def fork(self) -> Matcher:
        return Anything()


class Panic(BaseException):
    """As pyo3's, which is no Exception."""


class Compiler:
    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.let_go = threading.Event()

    def compile(self, grammar: Grammar) -> Matcher:
        self.compiled.append(grammar.text)
        if grammar.text.startswith("slow"):
            assert self.let_go.wait(TIMEOUT_S)
        if grammar.text == "bad":
            raise InvalidRequest("it is none", field="grammar")
        if grammar.text == "broken":
            raise ValueError("a fault of ours")
        if grammar.text == "panic":
            raise Panic("a fault of the library's")
        return Anything()


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@contextmanager
def pool_of(compiler: Compiler, clock: Clock | None = None) -> Iterator[GuidePool]:
    pool = GuidePool(lambda: compiler, 40, max_s=2.0, clock=clock or Clock())
    try:
        yield pool
    finally:
        compiler.let_go.set()
        pool.close()


def ask(pool: GuidePool, text: str, output: list[int] | None = None) -> tuple[Compilation, threading.Event]:
    done = threading.Event()
    params = SamplingParams(grammar=Grammar(kind="regex", text=text))
    return pool.prepare(params, output or [], ENDS, done.set), done


def get(pool: GuidePool, text: str, output: list[int] | None = None) -> Compilation:
    job, done = ask(pool, text, output)
    assert job.is_done or done.wait(TIMEOUT_S)
    return job


def test_a_grammar_is_compiled_once_and_is_there_at_once_afterwards() -> None:
    compiler = Compiler()
    with pool_of(compiler) as pool:
        first = get(pool, "a")
        again, _ = ask(pool, "a")
        assert again.is_done and again.guide is not first.guide
        assert get(pool, "a", [2] * 1000).guide is not None, "a long replay is the pool's work"
        assert compiler.compiled == ["a"]
        assert first.guide is not None and np.array_equal(first.guide.allowed([]), full(40))


def test_what_is_wrong_is_told_and_the_next_one_is_served() -> None:
    with pool_of(Compiler()) as pool:
        assert isinstance(get(pool, "bad").error, InvalidRequest)
        assert isinstance(get(pool, "broken").error, InternalError)
        assert isinstance(get(pool, "panic").error, InternalError)
        assert isinstance(get(pool, "a", [13]).error, InternalError), "a replay that the grammar has not"
        assert get(pool, "a").error is None
        with pytest.raises(InvalidRequest, match="4096"):
            ask(pool, "a" * 5000)


def until_begun(job: Compilation) -> None:
    while job.began_at is None:
        threading.Event().wait(0.001)


@pytest.mark.parametrize("who", ["who waits", "who comes"])
def test_a_grammar_that_never_ends_holds_nobody_up_when_its_own_client_has_gone(who: str) -> None:
    compiler, clock = Compiler(), Clock()
    with pool_of(compiler, clock) as pool:
        gone, _ = ask(pool, "slow")
        until_begun(gone)
        gone.cancel()
        waiting, done = ask(pool, "quick")
        clock.now += 3.0
        if who == "who waits":
            assert not waiting.is_overdue(clock.now), "it has not begun"
        else:
            assert get(pool, "another").guide is not None
        assert done.wait(TIMEOUT_S) and waiting.guide is not None


def test_no_thread_is_no_end_of_grammars(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_thread(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with pool_of(Compiler()) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(threading.Thread, "start", no_thread)
            with pytest.raises(QueueFull, match="thread"):
                ask(pool, "a")
        assert get(pool, "a").guide is not None


def test_a_grammar_that_never_ends_is_left_behind_and_many_of_them_refused_until_they_end() -> None:
    compiler, clock = Compiler(), Clock()
    with pool_of(compiler, clock) as pool:
        stuck = []
        for number in range(MAX_STUCK):
            job, _ = ask(pool, f"slow {number}")
            until_begun(job)
            assert not job.is_overdue(clock.now)
            clock.now += 3.0
            assert job.is_overdue(clock.now)
            job.cancel()
            stuck.append(job)
            if number + 1 < MAX_STUCK:
                assert get(pool, f"quick {number}").guide is not None
        with pytest.raises(QueueFull):
            ask(pool, "another")
        compiler.let_go.set()
        while True:
            try:
                assert get(pool, "another").guide is not None
                break
            except QueueFull:
                threading.Event().wait(0.001)


def test_what_waits_behind_grammars_that_never_end_starts_no_more_threads() -> None:
    compiler, clock = Compiler(), Clock()
    with pool_of(compiler, clock) as pool:
        before = {thread for thread in threading.enumerate() if thread.name == "grammars"}
        jobs = [ask(pool, f"slow {number}")[0] for number in range(2 * MAX_STUCK)]
        for job in jobs[:MAX_STUCK]:
            until_begun(job)
            clock.now += 3.0
            assert job.is_overdue(clock.now)
        assert not any(job.is_overdue(clock.now) for job in jobs[MAX_STUCK:]), "they have not begun"
        started = {thread for thread in threading.enumerate() if thread.name == "grammars"} - before
        assert len(started) <= MAX_STUCK
        compiler.let_go.set()


def test_the_cache_is_bounded() -> None:
    compiler = Compiler()
    with pool_of(compiler) as pool:
        for number in range(MAX_CACHED + 1):
            get(pool, f"g{number}")
        assert ask(pool, f"g{MAX_CACHED}")[0].is_done and ask(pool, "g1")[0].is_done
        get(pool, "g0")
        assert compiler.compiled.count("g0") == 2
