"""The check before publishing: hostile strategies are refused and told why, good ones pass."""

from __future__ import annotations

import inspect
import sys

import pytest

from microserve.services.command.strategy import check
from microserve.services.command.strategy.check import is_sound
from microserve.services.router.authoring.definition import Strategy
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.faults.dry_run import try_strategy
from tests.support.router.hostile_strategies import GOOD, HEAD, HOSTILE, SERVE


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_strategy_is_refused_and_told_why(name: str) -> None:
    source, says = HOSTILE[name]
    trial = try_strategy("mine", source, {}, [[], []])
    assert any(says in problem for problem in trial.problems), trial.problems


@pytest.mark.parametrize("strategy", BUILT_IN, ids=lambda strategy: strategy.name)
def test_the_strategies_that_are_shipped_pass_when_they_are_published(strategy: Strategy) -> None:
    source = inspect.getsource(sys.modules[strategy.function.__module__])
    meshes: list[list[list[str]]] = [[[], []], [["prefill"], ["decode"], ["decode"]]]
    for labels in meshes:
        trial = try_strategy(strategy.name, source, {}, labels)
        assert trial.problems == []
        assert trial.request_s > 0


STREAM = "async for tokens in engine.start_generate(request):\n"
HARD = {
    "a prompt that is long": (
        "    if request.num_tokens > 1000: raise ValueError('too long for me')\n" + SERVE,
        "with prompts of up to 8192 tokens: ValueError: too long for me",
    ),
    "an engine that is slow": (
        "    async with asyncio.timeout(0.6 if request.num_tokens < 1000 else 60):\n"
        "        engine = mesh.engines()[-1]\n"
        f"        {STREAM}            yield tokens\n",
        "while an engine was ten times slower than the others: TimeoutError",
    ),
    "an engine that is lost": (
        f"    [engine, other] = mesh.engines()\n    {STREAM}        yield tokens\n",
        "while an engine was lost: ValueError: not enough values to unpack",
    ),
    "an engine that is lost, and asked again": (
        f"    engine = mesh.engines()[-1]\n    try:\n        {STREAM}            yield tokens\n"
        f"    except Exception:\n        {STREAM}            yield tokens\n",
        "while an engine was lost: ",
    ),
}


@pytest.mark.parametrize("name", HARD)
def test_what_only_shows_where_it_is_hard_shows(name: str) -> None:
    body, says = HARD[name]
    trial = try_strategy("mine", HEAD + body, {}, [[], []])
    assert any(problem.startswith(says) for problem in trial.problems), trial.problems


def test_an_empty_mesh_is_tried_as_one_engine() -> None:
    assert try_strategy("mine", GOOD, {"ratio": 0.5}, []).problems == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (HEAD + "    time.sleep(3)\n" + SERVE, "time.sleep"),
        ("import no_such_module\n" + GOOD, "ModuleNotFoundError"),
        (GOOD + "def\n", "SyntaxError"),
        (HEAD + "    block = bytearray(1 << 43)\n" + SERVE, "MemoryError"),
        (HEAD + "    os._exit(9)\n" + SERVE, "ended with code 9"),
        (HEAD.replace("float", "no_such_type") + SERVE, "NameError"),
    ],
)
def test_what_would_hurt_the_checker_is_refused_by_a_process_of_its_own(
    source: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_sound("mine", source, {}, [[], []], True)
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    "source",
    [HEAD + "    while True: pass\n" + SERVE, GOOD + "while True: pass\n"],
    ids=["in a request", "when it is loaded"],
)
def test_an_endless_loop_is_broken_off(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not is_sound("mine", source, {}, [[]], True)
    assert "held the router" in capsys.readouterr().err


def test_a_decision_over_its_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    busy = "    end = time.perf_counter() + 0.15\n    while time.perf_counter() < end: pass\n"
    assert not is_sound("mine", HEAD + busy + SERVE, {}, [[]], True)
    assert "too long at a time" in capsys.readouterr().err


def test_what_no_signal_ends_is_ended_from_outside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "CHECK_S", 2.0)
    deaf = "    import signal\n    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})\n"
    assert not is_sound("mine", HEAD + deaf + "    while True: pass\n" + SERVE, {}, [[]], True)
    assert "endless loop" in capsys.readouterr().err


def test_without_a_dry_run_shape_and_parameters_are_still_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_sound("mine", HOSTILE["exception"][0], {}, [[]], False)
    assert not is_sound("mine", GOOD, {"ratio": "much"}, [[]], False)
    assert not is_sound("mine", GOOD.replace("async def", "def").replace("async for", "for"), {}, [[]], False)
    assert "must be a number" in capsys.readouterr().err


def test_what_a_strategy_prints_is_not_taken_for_the_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert is_sound("mine", "print('{\"problems\": []}')\n" + GOOD, {}, [[], []], True)
    assert "dry run in the simulation" in capsys.readouterr().out
