"""Real child processes: readiness, restarts and their limit, order of stopping, nothing left behind."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.local.directory import ChildState as DirectoryChild
from microserve.services.local.supervisor import Child, ChildState, MeshFailed, RestartWindow, Supervisor
from microserve.services.local.view import describe

TIMEOUT_S = 30.0

READY = """
import os, signal, socket, sys
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.connect("\\0" + os.environ["NOTIFY_SOCKET"][1:])
notify.send(b"READY=1\\nSTATUS=ready\\nX_ADDRESS=tcp://here")
"""
SERVE = READY + "signal.pause()"
STUBBORN = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + READY
STUBBORN += "while True: signal.pause()"
CRASH_AFTER_READY = READY + "sys.exit(3)"
SERVE_UNTIL_ASKED = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))\n" + SERVE
CRASH = "import sys; sys.exit('no such model')"
SILENT = "import signal; signal.pause()"
WITH_GRANDCHILD = (
    "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True)\n" + SERVE
)


def child(directory: Path, name: str, script: str, **options: Any) -> Child:
    argv = [sys.executable, "-S", "-c", script]
    return Child(name, argv, directory / f"{name}.jsonl", directory / f"{name}.out", **options)


class Watched:
    """A supervisor's state changes, and a way to wait for one."""

    def __init__(self, children: list[Child], **options: Any) -> None:
        self.changes: list[tuple[str, ChildState]] = []
        self._changed = asyncio.Condition()
        self.children = children
        self.supervisor = Supervisor(
            children,
            **{"max_restarts": 3, "restart_window_s": 60.0, "ready_timeout_s": TIMEOUT_S, **options},
            changed=self._record,
        )
        self._signal = asyncio.Event()

    def _record(self, changed: Child) -> None:
        self.changes.append((changed.name, changed.state))
        self._signal.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not condition():
                self._signal.clear()
                await self._signal.wait()


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 2 * TIMEOUT_S))


def test_children_become_ready_and_are_gone_afterwards(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "index-0", SERVE), child(tmp_path, "engine-0", SERVE)])
        async with watched.supervisor:
            await watched.supervisor.ready()
            pids = [each.pid for each in watched.children]
            assert all(each.state is ChildState.READY for each in watched.children)
            assert [each.address for each in watched.children] == ["tcp://here"] * 2
            assert all(psutil.pid_exists(pid) for pid in pids)
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert all(each.state is ChildState.STOPPED and each.pid == 0 for each in watched.children)

    run(test())


def test_what_a_child_says_of_itself_is_shown(tmp_path: Path) -> None:
    """An engine that the index refuses lives on, and ``ps`` has the reason."""
    speaking = READY + "notify.send(b'STATUS=refused by the index: two digests'); signal.pause()"

    async def test() -> None:
        watched = Watched([child(tmp_path, "engine-0", speaking)])
        async with watched.supervisor:
            await watched.until(lambda: bool(watched.children[0].detail))
            shown = describe(DirectoryChild.of(watched.children[0]))
            assert shown.startswith("engine-0     ready")
            assert shown.endswith("tcp://here refused by the index: two digests")

    run(test())


def test_what_a_child_is_ready_with_is_shown(tmp_path: Path) -> None:
    said = "tcp://here\\nX_ABOUT=exact in c1\\nX_FACTS={\\x22exact\\x22: \\x22true\\x22}"
    about = READY.replace("tcp://here", said) + "signal.pause()"

    async def test() -> None:
        watched = Watched([child(tmp_path, "engine-0", about)])
        async with watched.supervisor:
            await watched.supervisor.ready()
            state = DirectoryChild.of(watched.children[0])
            assert (state.address, state.about) == ("tcp://here", "exact in c1")
            assert state.facts == {"exact": "true"}
            assert describe(state).endswith("tcp://here exact in c1")

    run(test())


def test_one_crashed_child_is_restarted_and_the_others_stay(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "a", SERVE), child(tmp_path, "b", SERVE)])
        crashing, staying = watched.children
        async with watched.supervisor:
            await watched.supervisor.ready()
            first, other = crashing.pid, staying.pid
            os.kill(first, signal.SIGKILL)
            await watched.until(lambda: crashing.restarts == 1 and crashing.state is ChildState.READY)
            assert crashing.pid != first
            assert (staying.pid, staying.restarts) == (other, 0)
        assert ("a", ChildState.RESTARTING) in watched.changes

    run(test())


@pytest.mark.parametrize("script", [SERVE_UNTIL_ASKED, READY])
def test_a_child_that_ends_well_stays_stopped_and_the_others_run(tmp_path: Path, script: str) -> None:
    """A drained engine, or a service that somebody has sent SIGTERM: no crash, and no restart."""

    async def test() -> None:
        watched = Watched([child(tmp_path, "a", script), child(tmp_path, "b", SERVE)], max_restarts=0)
        leaving, staying = watched.children
        async with watched.supervisor:
            await watched.supervisor.ready()
            if script == SERVE_UNTIL_ASKED:
                os.kill(leaving.pid, signal.SIGTERM)
            await watched.until(lambda: leaving.state is ChildState.STOPPED)
            assert (leaving.pid, leaving.restarts) == (0, 0)
            assert staying.state is ChildState.READY
            failing = asyncio.create_task(watched.supervisor.watch())
            await asyncio.sleep(0)
            assert not failing.done()
            failing.cancel()
        assert [each.state for each in watched.children] == [ChildState.STOPPED] * 2
        assert ("a", ChildState.RESTARTING) not in watched.changes

    run(test())


def test_a_child_that_ends_too_often_is_left_down_and_the_others_serve(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "a", SERVE), child(tmp_path, "b", CRASH_AFTER_READY)])
        well, sick = watched.children
        async with watched.supervisor:
            await watched.supervisor.ready()
            pid = well.pid
            await watched.until(lambda: sick.state is ChildState.FAILED)
            assert (well.state, well.pid, well.restarts) == (ChildState.READY, pid, 0)
            assert (sick.restarts, sick.pid) == (3, 0)
            assert "b ended with exit code 3; that is more than 3 restarts in 60 s" in sick.detail
            os.kill(pid, signal.SIGKILL)
            await watched.until(lambda: well.restarts == 1 and well.state is ChildState.READY)
        assert [each.state for each in watched.children] == [ChildState.STOPPED, ChildState.FAILED]

    run(test())


def test_the_mesh_ends_when_no_child_can_be_kept_running(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "a", CRASH_AFTER_READY)])
        with pytest.raises(MeshFailed, match=r"(?s)a ended with exit code 3.*3 restarts in 60 s.*a\.jsonl"):
            async with watched.supervisor:
                await watched.supervisor.watch()
        assert watched.children[0].restarts == 3

    run(test())


def test_a_child_whose_log_cannot_be_written_is_ready_all_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "file").write_text("")
        watched = Watched([child(tmp_path / "file", "a", SERVE)])
        async with watched.supervisor:
            await watched.supervisor.ready()
            assert watched.children[0].address == "tcp://here"

    run(test())


def test_nobody_else_can_say_that_a_child_is_ready(tmp_path: Path) -> None:
    async def test() -> None:
        script = f"import subprocess; subprocess.run([{sys.executable!r}, '-S', '-c', {READY!r}])\n" + SILENT
        watched = Watched([child(tmp_path, "a", script)], ready_timeout_s=1.0)
        with pytest.raises(MeshFailed, match="not ready within 1 s"):
            async with watched.supervisor:
                await watched.supervisor.ready()

    run(test())


@pytest.mark.parametrize("failing", ["spawn", "shown", "pidfd"])
def test_what_fails_for_one_child_once_costs_neither_it_nor_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    """No process, no descriptor, a full disk or a closed terminal, while a child is started again."""

    async def test() -> None:
        watched = Watched([child(tmp_path, "a", SERVE), child(tmp_path, "b", SERVE)])
        restarting, staying = watched.children
        async with watched.supervisor:
            await watched.supervisor.ready()
            pid, failed = staying.pid, asyncio.Event()

            def fail(*_: Any, **__: Any) -> Any:
                monkeypatch.undo()
                failed.set()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

            target = {
                "spawn": (subprocess, "Popen"),
                "shown": (watched.supervisor, "_changed"),
                "pidfd": (os, "pidfd_open"),
            }[failing]
            monkeypatch.setattr(*target, fail)
            os.kill(restarting.pid, signal.SIGKILL)
            await asyncio.wait_for(failed.wait(), TIMEOUT_S)
            await watched.until(lambda: restarting.became_ready.is_set() and restarting.pid > 0)
            assert (staying.pid, staying.state) == (pid, ChildState.READY)
            os.kill(restarting.pid, signal.SIGKILL)
            await watched.until(lambda: restarting.restarts >= 2 and restarting.state is ChildState.READY)
        assert all(each.state is ChildState.STOPPED for each in watched.children)

    run(test())


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (CRASH, "a ended with exit code 1: no such model"),
        (SILENT, r"a ended with SIGKILL: not ready within 0\.3 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "a ended with SIGSEGV"),
        (
            'print(\'{"event": "service.failed", "level": "error", "error": "port 80 is taken"}\'); exit(1)',
            "a ended with exit code 1: port 80 is taken",
        ),
    ],
)
def test_a_child_that_was_never_ready_fails_the_start_and_says_why(
    tmp_path: Path, script: str, why: str
) -> None:
    async def test() -> None:
        timeout_s = 0.3 if script == SILENT else TIMEOUT_S
        watched = Watched([child(tmp_path, "a", script)], ready_timeout_s=timeout_s)
        with pytest.raises(MeshFailed, match=why):
            async with watched.supervisor:
                await watched.supervisor.ready()
        assert watched.children[0].restarts == 0

    run(test())


def test_the_log_of_an_earlier_run_does_not_count(tmp_path: Path) -> None:
    async def test() -> None:
        one = child(tmp_path, "a", CRASH)
        one.log.write_text('{"event": "service.failed", "level": "error", "error": "old"}\n')
        watched = Watched([one])
        with pytest.raises(MeshFailed, match="no such model"):
            async with watched.supervisor:
                await watched.supervisor.ready()
        assert one.address == ""

    run(test())


def test_stops_in_order_and_kills_the_stubborn(tmp_path: Path) -> None:
    async def test() -> None:
        children = [
            child(tmp_path, "index", SERVE, stop_order=2),
            child(tmp_path, "engine", STUBBORN, stop_order=1, stop_timeout_s=0.3),
            child(tmp_path, "gateway", SERVE, stop_order=0),
        ]
        watched = Watched(children)
        async with watched.supervisor:
            await watched.supervisor.ready()
        ends = [
            change for change in watched.changes if change[1] in (ChildState.STOPPING, ChildState.STOPPED)
        ]
        assert [name for name, state in ends if state is ChildState.STOPPING] == [
            "gateway",
            "engine",
            "index",
        ]
        assert ends.index(("gateway", ChildState.STOPPED)) < ends.index(("index", ChildState.STOPPING))
        assert "did not stop within 0.3 s" in children[1].detail

    run(test())


def test_what_a_child_has_started_goes_with_it(tmp_path: Path) -> None:
    async def test() -> None:
        watched = Watched([child(tmp_path, "a", WITH_GRANDCHILD)])
        async with watched.supervisor:
            await watched.supervisor.ready()
            grandchild = psutil.Process(int((tmp_path / "a.out").read_text().split()[0]))
        grandchild.wait(TIMEOUT_S)

    run(test())


def test_what_a_killed_child_had_in_the_temporary_directory_goes_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", None)
    paths = f"import sys; sys.path[:0] = {sys.path!r}\n"  # children begin without those of the environment
    owner = f"{paths}from microserve.protocol.process.scratch import Scratch; scratch = Scratch()\n{SERVE}"

    async def test() -> None:
        watched = Watched([child(tmp_path, "a", owner), child(tmp_path, "b", owner)])
        async with watched.supervisor:
            await watched.supervisor.ready()
            killed, staying = watched.children
            before = set(temporary.iterdir())
            os.kill(killed.pid, signal.SIGKILL)
            await watched.until(lambda: killed.restarts == 1 and killed.state is ChildState.READY)
            after = set(temporary.iterdir())
            assert (len(before), len(after), len(before & after), staying.restarts) == (2, 2, 1, 0)
        assert not list(temporary.iterdir())

    run(test())


def test_sigkill_of_the_supervisor_leaves_no_child(tmp_path: Path) -> None:
    script = f"""
import asyncio, pathlib, sys
from microserve.services.local.supervisor import Child, Supervisor
async def main():
    argv = [sys.executable, "-S", "-c", {SERVE!r}]
    here = pathlib.Path({str(tmp_path)!r})
    children = [Child(n, argv, here / n, here / f"{{n}}.out") for n in "ab"]
    async with Supervisor(children, max_restarts=1, restart_window_s=1, ready_timeout_s=30) as supervisor:
        await supervisor.ready()
        print([child.pid for child in children], flush=True)
        await supervisor.watch()
asyncio.run(main())
"""
    supervisor = subprocess.Popen([sys.executable, "-P", "-c", script], stdout=subprocess.PIPE, text=True)
    with supervisor:
        assert supervisor.stdout is not None
        # The supervisor's own log goes to its stdout too, as nothing has configured it.
        line = next(text for text in supervisor.stdout if text.startswith("["))
        children = [psutil.Process(pid) for pid in json.loads(line)]
        assert len(children) == 2
        supervisor.kill()
    _, alive = psutil.wait_procs(children, TIMEOUT_S)
    assert alive == []


def test_a_child_whose_supervisor_is_already_gone_does_not_start() -> None:
    leash = Path(sys.modules[Supervisor.__module__].__file__ or "").with_name("leash.py")
    stranger = subprocess.run(
        [sys.executable, "-S", str(leash), "1", "echo", "started"], capture_output=True, check=False
    )
    assert (stranger.returncode, stranger.stdout) == (1, b"")


@given(
    times=st.lists(st.floats(0, 100), max_size=40).map(sorted),
    max_restarts=st.integers(0, 4),
    window_s=st.floats(0.5, 50),
)
def test_restart_window_against_its_definition(
    times: list[float], max_restarts: int, window_s: float
) -> None:
    window = RestartWindow(max_restarts, window_s)
    allowed: list[float] = []
    for now in times:
        recent = [then for then in allowed if now - then < window_s]
        expected = len(recent) < max_restarts
        assert window.allow(now) is expected
        if expected:
            allowed.append(now)
