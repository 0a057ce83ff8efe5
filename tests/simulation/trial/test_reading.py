"""What reading a source shows, and what it must not take for a mistake."""

from __future__ import annotations

import inspect
import sys

import pytest

from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.trial.mistake import MISTAKES
from microserve.services.simulation.trial.reading import labels_in, read
from tests.support.router.mistaken_strategies import HEAD, SAMPLES, SERVE

READABLE = {
    *("an await that is forgotten", "a clock", "lots", "a sleep that blocks", "a loop without an end"),
    *("a cancellation that is caught", "a cancellation that is suppressed", "a name that is private"),
    *("a module of the router's", "an end of the router"),
}


def test_every_mistake_of_the_list_has_a_sample_and_no_other_has() -> None:
    assert {sample.mistake for sample in SAMPLES.values()} == set(MISTAKES)
    assert len(MISTAKES) == 21


@pytest.mark.parametrize("name", SAMPLES)
def test_reading_finds_its_own_and_nothing_else(name: str) -> None:
    sample = SAMPLES[name]
    found = [(each.mistake, each.line) for each in read({"__init__.py": sample.source})]
    assert found == ([(sample.mistake, sample.line)] if name in READABLE else [])


@pytest.mark.parametrize("strategy", BUILT_IN, ids=lambda strategy: strategy.name)
def test_shipped_strategies_use_nothing_that_an_operators_file_cannot(strategy: Strategy) -> None:
    """No private name, no module but the door's (import-linter knows imports alone), no clock, no lots."""
    source = inspect.getsource(sys.modules[strategy.function.__module__])
    assert read({"__init__.py": source}) == []


GOOD = {
    "awaited later": "    asking = decode.prep_recv(request)\n    grant = await asking\n",
    "gathered": "    a, b = await asyncio.gather(decode.prep_recv(request), decode.prep_recv(request))\n",
    "in a task": "    task = asyncio.create_task(decode.prep_recv(request))\n    grant = await task\n",
    "within a time": "    grant = await asyncio.wait_for(decode.prep_recv(request), 1)\n",
    "collected": "    asked = [decode.prep_recv(request)]\n    grants = await asyncio.gather(*asked)\n",
    "a lock": "    lock.release()\n    semaphore.release()\n",
    "raised again": "    try:\n        await asyncio.sleep(1)\n    except BaseException:\n        raise\n",
    "every exception": "    try:\n        await asyncio.sleep(1)\n    except Exception:\n        pass\n",
    "no wait in it": "    try:\n        x = 1\n    except BaseException:\n        pass\n",
    "its own task": (
        "    task.cancel()\n    try:\n        await task\n    except asyncio.CancelledError:\n        pass\n"
    ),
    "a loop that waits": "    while True:\n        await asyncio.sleep(1)\n",
    "a loop that ends": "    while True:\n        if request.num_tokens: break\n",
    "lots with a seed": "    rng = random.Random(7)\n    rng.random()\n",
    "in a thread": "    await asyncio.to_thread(lambda: open('x').read())\n",
    "handed to a thread": "    await asyncio.to_thread(time.sleep, 1)\n",
    "its own underscore": "    _private = 1\n    self._x = _private\n",
    "a replaced tuple": "    split = split._replace(end=1)\n",
    "a task of its object": (
        "    self.task.cancel()\n    with contextlib.suppress(asyncio.CancelledError):\n"
        "        await self.task\n"
    ),
    "a loop that an error ends": (
        "    try:\n        while True:\n            kept.pop()\n    except IndexError:\n        pass\n"
    ),
    "the mesh's": "    at = mesh.now\n    draw = mesh.rng.random()\n",
}


HELPERS = {
    "read in a thread": (
        "def load():\n    return open('x').read()\n",
        "    mesh.state['load'] = mesh.load(mesh.engines()[0])\n    await asyncio.to_thread(load)\n",
    ),
    "read in a thread, by one that is read there": (
        "def parse(path):\n    return open(path).read()\ndef load():\n    return parse('x')\n",
        "    await asyncio.to_thread(functools.partial(load))\n",
    ),
    "read when it is loaded": ("def load():\n    return open('x').read()\nTABLE = load()\n", ""),
    "a method called release": (
        "class Budget:\n    def release(self, count):\n        self.left = count\n",
        "    Budget().release(3)\n",
    ),
    "its own underscores": (
        "class Rank:\n    def __init__(self):\n        self._at = 1\n"
        "    def __lt__(self, other):\n        return self._at < other._at\n",
        "    Rank()\n",
    ),
    "a coroutine that is awaited": (
        "async def reserve(engine):\n    await asyncio.sleep(1)\n",
        "    await reserve(1)\n    task = asyncio.create_task(reserve(2))\n    await task\n",
    ),
}


@pytest.mark.parametrize("name", HELPERS)
def test_what_its_own_functions_do_is_no_mistake_where_no_router_does_it(name: str) -> None:
    helper, body = HELPERS[name]
    assert read({"__init__.py": helper + HEAD + body + SERVE}) == []
    package = {"__init__.py": "from .helper import *\n" + HEAD + body + SERVE, "helper.py": helper}
    assert read(package) == []


CHANGED = {
    "an await that is forgotten in a condition": (
        "",
        "    if mesh.engines():\n        decode.release(request, grant)\n",
        "forgotten-await",
    ),
    "one that is asked": ("", "    if decode.prep_recv(request): pass\n", "forgotten-await"),
    "one of two": ("", "    grant = decode.prep_recv(request) if split else None\n", "forgotten-await"),
    "one's own": (
        "async def reserve(engine):\n    await asyncio.sleep(1)\n",
        "    reserve(1)\n",
        "forgotten-await",
    ),
    "read before the thread begins": ("", "    await asyncio.to_thread(open('x').read)\n", "blocking-call"),
    "read by a helper": ("def load():\n    return open('x')\n", "    load()\n", "blocking-call"),
    "read by a helper's helper": (
        "def parse():\n    return open('x')\ndef load():\n    return parse()\n",
        "    mesh.pick(None, request, cost=lambda engine: load())\n",
        "blocking-call",
    ),
    "a name that is private, beside one's own": (
        "class Own:\n    _book = 1\n",
        "    mesh._book\n",
        "not-the-door",
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_mistake_is_told_however_it_is_put(name: str) -> None:
    helper, body, mistake = CHANGED[name]
    assert [each.mistake for each in read({"__init__.py": helper + HEAD + body + SERVE})] == [mistake]
    package = {
        "__init__.py": "from .helper import load, reserve\n" + HEAD + body + SERVE,
        "helper.py": helper,
    }
    assert [each.mistake for each in read(package)] == [mistake]


@pytest.mark.parametrize("name", GOOD)
def test_what_is_no_mistake_is_not_told(name: str) -> None:
    assert read({"__init__.py": HEAD + GOOD[name] + SERVE}) == []


def test_what_is_read_when_a_source_is_loaded_is_no_mistake() -> None:
    source = "import json, time\nTABLE = json.load(open('/dev/null'))\nBEGAN = time.time()\n"
    assert read({"__init__.py": source + HEAD + SERVE}) == []


def test_each_file_of_a_package_is_read() -> None:
    files = {
        "__init__.py": "from .clock import now\n" + HEAD + SERVE,
        "clock.py": "import time\ndef now():\n",
    }
    files["clock.py"] += "    return time.time()\n"
    assert [(each.file, each.line) for each in read(files)] == [("clock.py", 3)]


def test_labels_are_those_that_are_asked_for_and_not_given() -> None:
    body = "    mesh.label(mesh.engines()[0], 'own')\n    mesh.pick('own', request)\n"
    body += "    mesh.pick(near, request)\n"
    body += "    mesh.pick('gold' if ratio else 'silver', request)\n    mesh.engines('rack-1', strict=True)\n"
    source = HEAD.replace("ratio: float = 0.1", "ratio: float = 0.1, near: str = 'close'") + body + SERVE
    assert set(labels_in({"__init__.py": source}, {})) == {"close", "gold", "silver", "rack-1"}
    assert "far" in labels_in({"__init__.py": source}, {"near": "far"})
