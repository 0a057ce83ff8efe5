"""Peers as child processes that answer JSON lines; a peer that is not there is a line, and no failure.

    asked      {"prompts": [[ids], ...], "num_tokens": n}      all at once, greedy, no end before n
    answered   {"times": [[seconds since asked, of each token], ...]}

Owns those processes, and the environments by ``benchmarks/peers.sh``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine_parts.serving import Stream

PARTS = Path(__file__).parent
NAMES = ("openvino", "transformers", "vllm")


class PeerAbsent(Exception):
    """The text is the line to print."""


@dataclass
class Peer:
    name: str
    version: str
    _child: subprocess.Popen[str]

    def play(self, prompts: list[list[int]], num_tokens: int) -> list[Stream]:
        self.ask(prompts, num_tokens)
        return self.answer(num_tokens)

    def ask(self, prompts: list[list[int]], num_tokens: int) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"prompts": prompts, "num_tokens": num_tokens}) + "\n")
        self._child.stdin.flush()

    def answer(self, num_tokens: int) -> list[Stream]:
        """Of what was asked; waits for it."""
        streams = [Stream(times, len(times)) for times in _read(self._child)["times"]]
        if any(stream.num_tokens != num_tokens for stream in streams):
            raise RuntimeError(f"{self.name} did not give {num_tokens} tokens to everybody")
        return streams


@contextmanager
def peer(name: str, model: str, threads: int) -> Iterator[Peer]:
    """Raises :class:`PeerAbsent`."""
    python, *exported = installed(name, model)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    given = [exported[0] if exported else model, str(threads)]
    with _child(name, [python, str(PARTS / f"peer_{name}.py"), *given], environment) as made:
        yield made


@contextmanager
def bare_engine(model: str, threads: int, dtype: str) -> Iterator[Peer]:
    """This project's native step in a process of its own, with nothing around it."""
    command = [sys.executable, "-P", str(PARTS / "bare_engine.py"), model, str(threads), dtype]
    with _child("bare engine", command, dict(os.environ)) as made:
        yield made


@contextmanager
def _child(name: str, command: list[str], environment: dict[str, str]) -> Iterator[Peer]:
    child = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        try:
            version = str(_read(child)["version"])
        except RuntimeError:
            raise PeerAbsent(f"peer {name}: not installed (it does not start)") from None
        yield Peer(name, version, child)
    finally:
        child.terminate()
        child.wait()


def installed(name: str, model: str) -> list[str]:
    """Its interpreter, and what else ``peers.sh`` says. May install for minutes."""
    script = PARTS.parents[1] / "peers.sh"
    environment = {"PYTHON": sys.executable, **os.environ}
    done = subprocess.run(
        [script, name, model], stdout=subprocess.PIPE, text=True, env=environment, check=False
    )
    lines = done.stdout.strip().splitlines() or [f"peer {name}: not installed (peers.sh failed)"]
    if done.returncode or lines[-1].startswith("peer "):
        raise PeerAbsent(lines[-1])
    return lines


def _read(child: subprocess.Popen[str]) -> dict[str, list[list[float]]]:
    """Its next answer; libraries print on the same stream."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith("{"):
            return json.loads(line)  # type: ignore[no-any-return]
    raise RuntimeError(f"a peer ended with status {child.wait()}")
