"""What a mesh costs that does nothing: its second start, its memory, and its rest.

    python benchmarks/mesh/start_and_rest.py [--before DIR] [--rounds 3] [--idle-s 20] [--set K=V] [--json]

Starts the default mesh (``up --no-demo`` on the demo model) until it says that it is ready, lets it rest, and
stops it; with ``--before`` in turns with that of another checkout, once each beforehand so that files are in
the page cache. By process: seconds from the start to ready (of the mesh: to ``READY=1``), CPU seconds until
then, resident and proportional memory (of what several map each has its part), and CPU and context switches
while nobody asks for anything. Medians over the rounds. Wall times are the machine's as it is; CPU times bear
a busy one. ``--json``: one line.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from microserve.services.local.demo.model import default_cache, fetch
from microserve.services.local.directory import MeshDirectory

SETTLE_S = 5.0
"""From ready to the first look at rest."""
READY_S = 300.0
UP, MESH = "up", "mesh"
FIGURES = ("ready_s", "cpu_s", "rss_mb", "pss_mb", "idle_cpu_percent", "switches_per_s")
TICK_S = 1 / os.sysconf("SC_CLK_TCK")

Figures = dict[str, float]


@dataclass
class Side:
    name: str
    checkout: Path
    rounds: list[dict[str, Figures]] = field(default_factory=list)
    """Figures by process, ``MESH`` for all together."""

    def medians(self) -> dict[str, Figures]:
        return {
            process: {
                name: statistics.median(each[process][name] for each in self.rounds) for name in FIGURES
            }
            for process in self.rounds[0]
        }


@contextmanager
def mesh(checkout: Path, model: str, settings: list[str]) -> Iterator[tuple[dict[str, int], float, float]]:
    """A mesh that is ready: pids by process, its start (wall clock), and seconds until ready."""
    with (
        tempfile.TemporaryDirectory(prefix="start-") as home,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices,
    ):
        notices.bind(f"{home}/notices")
        notices.settimeout(READY_S)
        given = [f"model.path={json.dumps(model)}", "gateway.port=0"]
        given += ['index.address="tcp://127.0.0.1:0"', 'router.address="tcp://127.0.0.1:0"', *settings]
        command = [sys.executable, "-P", "-m", "microserve.services", "up", "--no-demo"]
        command += ["--directory", f"{home}/mesh", *(part for each in given for part in ("--set", each))]
        environment = {
            **os.environ,
            "PYTHONPATH": str(checkout.resolve() / ".src"),
            "NOTIFY_SOCKET": f"{home}/notices",
        }
        at, began = time.time(), time.monotonic()
        with open(f"{home}/out", "wb") as out:
            process = subprocess.Popen(command, cwd=home, env=environment, stdout=out, stderr=out)
        try:
            while b"READY=1" not in notices.recv(4096).split(b"\n"):
                pass
            took_s = time.monotonic() - began
            state = MeshDirectory(Path(home) / "mesh").read()
            assert state is not None
            yield {UP: process.pid} | {each.name: each.pid for each in state.children}, at, took_s
        except TimeoutError:
            sys.exit(Path(home, "out").read_text(errors="replace"))
        finally:
            process.terminate()
            process.wait()


def measure(checkout: Path, model: str, settings: list[str], idle_s: float) -> dict[str, Figures]:
    with mesh(checkout, model, settings) as (pids, at, took_s):
        found = {name: {"cpu_s": cpu_s(pid), "ready_s": took_s} for name, pid in pids.items()}
        for name in pids.keys() - {UP}:
            found[name]["ready_s"] = ready_at(pids[UP], name) - at
        time.sleep(SETTLE_S)
        before = {name: (run_ns(pid), switches(pid)) for name, pid in pids.items()}
        began = time.monotonic()
        time.sleep(idle_s)
        after = {name: (run_ns(pid), switches(pid)) for name, pid in pids.items()}
        rested_s = time.monotonic() - began
        for name, pid in pids.items():
            ran, switched = (new - old for new, old in zip(after[name], before[name], strict=True))
            found[name] |= {"idle_cpu_percent": ran / 1e7 / rested_s, "switches_per_s": switched / rested_s}
            found[name] |= memory(pid)
    total = {name: sum(each[name] for each in found.values()) for name in FIGURES}
    return {**found, MESH: {**total, "ready_s": took_s}}


# --- what the kernel says ------------------------------------------------------------------------------


def cpu_s(pid: int) -> float:
    """Of the process and of children that have ended."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * TICK_S


def run_ns(pid: int) -> int:
    """Time on a CPU, of all threads: finer than the ticks of ``stat``."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)


def switches(pid: int) -> int:
    """Context switches of all threads, of their own accord or not."""
    said = "".join((task / "status").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int(line.split()[1]) for line in said.splitlines() if "ctxt_switches" in line)


def memory(pid: int) -> Figures:
    lines = (line.split() for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    kib = {name: int(value) for name, value, *_ in lines}
    return {"rss_mb": kib["Rss:"] / 1024, "pss_mb": kib["Pss:"] / 1024}


def ready_at(supervisor: int, name: str) -> float:
    """Wall clock at which a child said so in its log."""
    cwd = os.readlink(f"/proc/{supervisor}/cwd")
    for line in Path(f"{cwd}/mesh/logs/{name}.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "service.ready":
            return float(event["ts"])
    return float("nan")


# --- what is said ----------------------------------------------------------------------------------------


def show(sides: list[Side]) -> None:
    for side in sides:
        print(f"\n{side.name}, median of {len(side.rounds)}")
        print(f"{'':12}" + "".join(f"{name:>18}" for name in FIGURES))
        for process, figures in side.medians().items():
            print(f"{process:12}" + "".join(f"{figures[name]:18.2f}" for name in FIGURES))
    if len(sides) == 2:
        before, now = (side.medians()[MESH] for side in sides)
        print("\nnow / before" + "".join(f"{now[name] / before[name]:18.2f}" for name in FIGURES))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--before", metavar="CHECKOUT", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--idle-s", type=float, default=20.0)
    parser.add_argument("--set", action="append", default=[], metavar="K=V", help="a setting, of both sides")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    model = options.model or str(fetch(default_cache(os.environ)))
    sides = [Side("now", Path(__file__).resolve().parents[2])]
    if options.before:
        sides.insert(0, Side("before", options.before))
    for side in sides:
        with mesh(side.checkout, model, options.set):
            pass
    for number in range(options.rounds):
        for side in sides if number % 2 else reversed(sides):
            side.rounds.append(measure(side.checkout, model, options.set, options.idle_s))
    if options.json:
        print(json.dumps({side.name: side.medians() for side in sides}))
    else:
        show(sides)


if __name__ == "__main__":
    main()
