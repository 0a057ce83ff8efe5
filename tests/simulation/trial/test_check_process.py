"""A check in a process of its own: what would hurt the checker does not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from microserve.services.command.strategy import check
from microserve.services.command.strategy.check import look, tell
from tests.support.router.hostile_strategies import GOOD, HEAD, HOSTILE, SERVE


def sound(
    name: str, source: str, parameters: dict[str, object], labels: list[list[str]], *, dry_run: bool = True
) -> bool:
    return tell(look(name, source, parameters, labels, dry_run=dry_run), Path("mine.py"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (HEAD + "    time.sleep(3)\n" + SERVE, "time.sleep"),
        ("import no_such_module\n" + GOOD, "ModuleNotFoundError"),
        (GOOD + "def\n", "SyntaxError"),
        (HEAD + "    block = bytearray(1 << 43)\n" + SERVE, "MemoryError"),
        (HEAD + "    getattr(os, '_exit')(9)\n" + SERVE, "ended with code 9"),
        (HEAD.replace("float", "no_such_type") + SERVE, "NameError"),
    ],
)
def test_what_would_hurt_the_checker_is_refused_by_a_process_of_its_own(
    source: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not sound("mine", source, {}, [[], []])
    assert says in capsys.readouterr().err


PLANNED = """
import asyncio, json, time
from microserve.services.router.authoring import strategy

def load(path):
    time.sleep(0.01)
    with open(path) as file:
        return file.read()

TABLE = load("/etc/hostname")

async def keep(mesh):
    mesh.state["table"] = await asyncio.to_thread(load, "/etc/hostname")
    try:
        await asyncio.open_connection("127.0.0.1", 9)
    except OSError as error:
        mesh.state["away"] = str(error)

@strategy(plan=keep)
async def mine(mesh, request):
    if mesh.state.get("away"):
        mesh.note("table", length=len(mesh.state["table"]))
    yield mesh.pick(None, request).start_generate(request)
"""


def test_what_blocks_is_sound_where_the_mend_of_the_check_puts_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert sound("mine", PLANNED, {}, [[], []])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "source",
    [HEAD + "    n = 1\n    while n: n += 1\n" + SERVE, GOOD + "while True: pass\n"],
    ids=["in a request", "when it is loaded"],
)
def test_an_endless_loop_is_broken_off(source: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert not sound("mine", source, {}, [[]])
    assert "held the router" in capsys.readouterr().err


def test_a_decision_over_its_budget_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    busy = "    now = getattr(time, 'perf_counter')\n    end = now() + 0.15\n    while now() < end: pass\n"
    assert not sound("mine", HEAD + busy + SERVE, {}, [[]])
    assert "too long at a time" in capsys.readouterr().err


def test_what_no_signal_ends_is_ended_from_outside(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "CHECK_S", 2.0)
    deaf = "    import signal as s\n    getattr(s, 'pthread_sigmask')(s.SIG_BLOCK, {s.SIGALRM})\n"
    assert not sound("mine", HEAD + deaf + "    n = 1\n    while n: n += 1\n" + SERVE, {}, [[]])
    assert "endless loop" in capsys.readouterr().err


def test_what_is_deaf_to_signals_is_told_with_its_line() -> None:
    source = HEAD + "    sum(range(10**12))\n" + SERVE
    [found] = look("mine", source, {}, [[]]).mistakes
    assert (found.mistake, found.line) == (
        "endless-loop",
        source.splitlines().index("    sum(range(10**12))") + 1,
    )


def test_without_a_dry_run_shape_and_parameters_are_still_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert sound("mine", HOSTILE["exception"][0], {}, [[]], dry_run=False)
    assert not sound("mine", GOOD, {"ratio": "much"}, [[]], dry_run=False)
    assert not sound(
        "mine", GOOD.replace("async def", "def").replace("async for", "for"), {}, [[]], dry_run=False
    )
    assert "must be a number" in capsys.readouterr().err


def test_what_a_strategy_prints_is_not_taken_for_the_finding(capsys: pytest.CaptureFixture[str]) -> None:
    assert sound("mine", "print('{\"problems\": []}')\n" + GOOD, {}, [[], []])
    assert "dry run in the simulation" in capsys.readouterr().out


def test_a_check_that_had_no_processor_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its watchdog goes by the machine's clock."""
    starved = b'Timeout (0:00:05)!\nThread 0x1 (most recent call first):\n  File "<frozen runpy>", line 198\n'
    real, tries = subprocess.run, []

    def run(*args: Any, **options: Any) -> Any:
        tries.append(args)
        return (
            subprocess.CompletedProcess(args, 1, b"", starved) if len(tries) == 1 else real(*args, **options)
        )

    monkeypatch.setattr(subprocess, "run", run)
    assert look("mine", GOOD, {}, [[]], dry_run=False).mistakes == []
    assert len(tries) == 2
