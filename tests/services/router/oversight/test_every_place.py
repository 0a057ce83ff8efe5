"""A strategy that never ends, wherever it stands: its clients are served, others notice nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest
import structlog

from microserve.protocol import log
from microserve.services.router.oversight import overseer as overseer_module
from microserve.services.router.oversight.meter import Meter
from microserve.services.router.oversight.overseer import MAX_GROWTH_MB, Overseer
from microserve.services.router.rollout.control import load_source
from tests.support.router.router_world import World, eventually, expected_output, in_loop, router_world

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120, method="thread")]

PROMPT = list(range(50))
WITHIN_S = 2.0
"""What the case allows is 0.7 s, with a margin. Time in which the machine let others run does not count."""

HEAD = """
import asyncio, contextlib, functools, itertools, re, threading, time
from microserve.services.router.authoring import scorer, strategy

def forever(*_):
    while True:
        pass

class Endless:
    def __index__(self): return forever()
    def __lt__(self, other): return forever()
    def __eq__(self, other): return forever()
    def __hash__(self): return 1
    def __del__(self): forever()

class Quiet(Endless):
    def __del__(self): pass

async def closes_badly():
    try:
        yield 1
    finally:
        forever()

@strategy
async def mine(mesh, request):
    engine = mesh.engines()[0]
{body}
    async for tokens in engine.start_generate(request):
        yield tokens
"""

INSIDE = {
    "a loop": "forever()",
    "time.sleep": "time.sleep(600)",
    "a lock": "threading.Event().wait()",
    "except Exception": "while True:\n    try: forever()\n    except Exception: pass",
    "except BaseException": "while True:\n    try: forever()\n    except BaseException: pass",
    "bare except around sleep": "while True:\n    try: time.sleep(600)\n    except: pass",
    "bare excepts within each other": (
        "while True:\n    try:\n        while True:\n"
        "            try: forever()\n            except: forever()\n    except: forever()"
    ),
    "it keeps what it catches": (
        "kept = []\nwhile True:\n    try: time.sleep(600)\n    except BaseException as e: kept.append(e)"
    ),
    "suppress": "while True:\n    with contextlib.suppress(BaseException): forever()",
    "finally": "try: forever()\nfinally: forever()",
    "finally that goes on": "def f():\n    while True:\n        try: forever()\n        finally: continue\n"
    "f()",
    "generator's close": "g = closes_badly()\nawait anext(g)\nawait g.aclose()",
    "__del__": "Endless()",
    "__del__ without end": "while True: Endless()",
    "sort key": "sorted([1, 2], key=forever)",
    "comparison": "sorted([Quiet(), Quiet()])",
    "cost": "mesh.pick(None, request, cost=forever)",
    "scorer": "mesh.pick(None, request, scorers={forever: 1.0})",
    "exclude": "mesh.pick(None, request, exclude=range(10**12))",
    "end of prep_recv": "await engine.prep_recv(request, end=Quiet())",
    "begin of start_generate": "engine.start_generate(request, begin=Quiet())",
    "after of start_generate": (
        "class After: grant = property(forever)\nengine.start_generate(request, after=After())"
    ),
    "a library's loop": "max(itertools.count(), key=lambda n: n)",
    "a library's function": "functools.reduce(lambda a, b: b, itertools.count())",
    "regular expression": "re.match('(a+)+b', 'a' * 60)",
    "huge numbers": "10 ** 10 ** 8",
    "an exception's text": "class E(Exception): __str__ = __repr__ = forever\nraise E()",
    "what an exception holds": "class S(str): __str__ = __repr__ = forever\nraise ValueError(S())",
    "an error of the router's": (
        "from microserve.protocol.errors import InvalidInterval\n"
        "class S(str): __str__ = __repr__ = __format__ = forever\nraise InvalidInterval(S('x'))"
    ),
    "recursion": "def f(n):\n    for _ in range(9): n and f(n - 1)\nf(90)",
}
OUTSIDE = {
    "task": "asyncio.create_task(asyncio.sleep(0)).add_done_callback(forever); await asyncio.sleep(0.05)",
    "awaited task": "async def f(): forever()\nawait asyncio.create_task(f())",
    "task that catches": (
        "async def f():\n    while True:\n        try: forever()\n        except BaseException: pass\n"
        "asyncio.create_task(f()); await asyncio.sleep(0.05)"
    ),
    "callback": "asyncio.get_running_loop().call_soon(forever); await asyncio.sleep(0.05)",
    "timer": "asyncio.get_running_loop().call_later(0.01, forever); await asyncio.sleep(0.05)",
    "forgotten generator": "g = closes_badly()\nawait anext(g)\ndel g\nawait asyncio.sleep(0.05)",
    "yielded object": ("from microserve.services.router.authoring import Tokens\nyield Tokens(Quiet(), [])"),
    "sending's listener": (
        "grant = await engine.prep_recv(request, end=0)\n"
        "engine.remote_send(request, grant, end=0).listen(forever)"
    ),
}


@pytest.fixture
def overseer() -> Iterator[Overseer]:
    with Overseer(budget_s=0.1) as overseer:
        yield overseer


def source(body: str) -> str:
    return HEAD.format(body="".join(f"    {line}\n" for line in body.splitlines()))


def add(world: World, body: str) -> str:
    name = f"mine_{len(world.router.strategies.names)}"
    world.router.strategies.add(load_source(source(body), name))
    return name


async def longest_turn_s(stop: asyncio.Event) -> float:
    """Of the loop, until ``stop`` is set: for so long nobody else was served."""
    meter, longest = Meter(), 0.0
    began = time.perf_counter() - meter.starved_s()
    while not stop.is_set():
        await asyncio.sleep(0)
        ended = time.perf_counter() - meter.starved_s()
        longest, began = max(longest, ended - began), ended
    meter.close()
    return longest


async def broken_off(world: World, body: str) -> float:
    """Serve by it; the longest turn of the loop meanwhile. Its client gets its answer from another."""
    name, stop = add(world, body), asyncio.Event()
    with structlog.testing.capture_logs() as logs:
        watching = asyncio.create_task(longest_turn_s(stop))
        answer = await world.gateway.generate(PROMPT, strategy=name)
        assert answer.token_ids == expected_output(4)
        await eventually(
            lambda: [e for e in logs if "held the router" in e.get("error", "")], "it is told of", timeout_s=5
        )
        stop.set()
        longest_s = await watching
        # From now on plain service.
        logs.clear()
        again = await world.gateway.generate(PROMPT, strategy=name)
        assert again.token_ids == expected_output(4)
        assert not [e for e in logs if e["event"] == log.STRATEGY_FAILED]
    return longest_s


def with_a_world(overseer: Overseer, body: str) -> None:
    async def main() -> None:
        complaints: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        async with router_world("a", "b", overseer=overseer, liveness=600) as world:
            assert await broken_off(world, body) < WITHIN_S

    asyncio.run(main())


@pytest.mark.heavy
@pytest.mark.parametrize("place", INSIDE)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_between_two_awaits(overseer: Overseer, place: str) -> None:
    with_a_world(overseer, INSIDE[place])


@pytest.mark.heavy
@pytest.mark.parametrize("place", OUTSIDE)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_in_what_it_leaves_to_others(overseer: Overseer, place: str) -> None:
    with_a_world(overseer, OUTSIDE[place])


@pytest.mark.parametrize(
    ("body", "text"),
    [
        # An innocent error stays what it is; only what it was raised from is dropped.
        ("try: raise E()\nexcept E: raise ValueError('x')", "x"),
        ("raise ExceptionGroup('x', [ValueError(), E()])", "ExceptionGroup: x"),
    ],
    ids=["behind another", "in a group"],
)
def test_an_exception_that_is_not_shown_runs_no_code(overseer: Overseer, body: str, text: str) -> None:
    @in_loop
    async def main() -> None:
        async with router_world("a", "b", overseer=overseer, liveness=600) as world:
            name = add(world, f"class E(Exception): __str__ = __repr__ = forever\n{body}")
            with structlog.testing.capture_logs() as logs:
                answer = await world.gateway.generate(PROMPT, strategy=name)
            assert answer.token_ids == expected_output(4)
            [told] = [entry for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert told["error"].startswith(text)
            assert "held" not in told["error"]
            assert told["exc_info"].__context__ is None or told["exc_info"].__suppress_context__

    main()


def test_one_that_takes_memory_without_end_is_broken_off_before_it_has_all(
    overseer: Overseer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overseer_module, "HANG_S", 60.0)  # however slow the machine takes memory

    @in_loop
    async def main() -> None:
        async with router_world("a", "b", overseer=overseer, liveness=600) as world:
            body = "kept = []\nwhile True: kept.append(b'x' * (1 << 22))"
            name = add(world, body)
            with structlog.testing.capture_logs() as logs:
                answer = await world.gateway.generate(PROMPT, strategy=name)
            assert answer.token_ids == expected_output(4)
            [told] = [entry["error"] for entry in logs if entry["event"] == log.STRATEGY_FAILED]
            assert "MB of memory" in told
            assert int(told.split()[3]) > MAX_GROWTH_MB

    main()


def test_tasks_that_a_request_leaves_behind_end_with_it(overseer: Overseer) -> None:
    body = (
        "async def spin():\n    while True: await asyncio.sleep(0.001)\n"
        "asyncio.get_running_loop().spinning = [asyncio.create_task(spin()) for _ in range(3)]"
    )

    @in_loop
    async def main() -> None:
        async with router_world("a", "b", overseer=overseer, liveness=600) as world:
            answer = await world.gateway.generate(PROMPT, strategy=add(world, body))
            assert answer.token_ids == expected_output(4)
            spinning: list[asyncio.Task[None]] = asyncio.get_running_loop().spinning  # type: ignore[attr-defined]
            await eventually(lambda: all(task.cancelled() for task in spinning), "they are cancelled")

    main()


@pytest.mark.parametrize("cleanup", ["pass", "forever()"])
def test_all_requests_of_a_version_that_hangs_cost_the_router_little_more_than_one(
    overseer: Overseer, cleanup: str
) -> None:
    """Twelve streams run by it when it begins to hang, each would hold the router in turn."""
    body = (
        "try:\n"
        "    async for tokens in engine.start_generate(request):\n"
        "        yield tokens\n"
        "        forever()\n"
        f"finally:\n    {cleanup}\n"
    )

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: None)
        async with router_world("a", "b", overseer=overseer, liveness=600) as world:
            for engine in world.engines.values():
                engine.paused.add("decode")
            name, stop = add(world, body), asyncio.Event()
            answers = [world.gateway.start(PROMPT, strategy=name) for _ in range(12)]
            await eventually(
                lambda: sum(len(e.held) for e in world.engines.values()) >= len(answers), "all of them run"
            )
            watching = asyncio.create_task(longest_turn_s(stop))
            for engine in world.engines.values():
                engine.resume("decode")
            for answer in answers:
                await answer.wait()
                assert answer.token_ids == expected_output(4)
            stop.set()
            assert await watching < WITHIN_S

    asyncio.run(main())
