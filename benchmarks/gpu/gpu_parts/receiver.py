"""The engine at the other end, in a process of its own: ``python -m gpu_parts.receiver JSON``.

A process cannot open its own device memory by CUDA IPC, so transfers go to this one. It is an engine without
a model: heap, grants, prefix cache and commits are the real ones, and it computes nothing. It answers each
JSON line on stdin with one on stdout, once what was asked for has happened. ``Receiver`` is how the sender
talks to it. Times are of ``time.monotonic_ns``, which on Linux is one clock for all processes of a host.
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

import msgspec

from microserve.kvcache.heap.factory import make_heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InternalError
from microserve.protocol.logging.setup import configure
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.numerics import UNKNOWN
from microserve.protocol.settings.settings import LogSettings
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.batch import Batch, StepResult
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.core import EngineCore

INCARNATION = 2
TIMEOUT_S = 120.0
OWNER = b"benchmark"
LOOK_S = {"cpu": 1e-3, "cuda": 2e-5}
"""Pause between two looks at arrival counters; the system makes 20 us some 80. On a CPU the sender needs the
processor."""


class _NoModel:
    numerics = UNKNOWN

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        raise InternalError("the receiver has no model")


class _Commands:
    def __init__(self, layout: KvLayout, overrides: list[str], device: str) -> None:
        settings = load_settings(overrides=overrides)
        heap, self._data = make_heap(settings, layout, INCARNATION)
        self._look_s = LOOK_S[device.partition(":")[0]]
        self._num_layers = layout.num_layers
        self._num_calls = 0
        self.core = EngineCore(
            engine_id="receiver",
            incarnation=INCARNATION,
            model=layout.model,
            heap=heap,
            runner=_NoModel(),
            limits=Limits(
                max_model_len=layout.num_blocks * layout.block_size,
                vocab_size=1 << 31,
                num_blocks=layout.num_blocks,
                max_waiting=1,
                eos_token_ids=frozenset(),
            ),
            max_num_seqs=1,
            max_num_batched_tokens=1,
            lease_s=TIMEOUT_S,
            checksums=False,
        )

    def prepare(self, request_id: str, token_ids: list[int]) -> Any:
        """A grant for all of the tokens."""
        message = wire.PrepRecv(self._call(), request_id, len(token_ids), TIMEOUT_S)
        with self.core.lock:
            granted = self.core.actions.prep_recv(OWNER, message, token_ids, time.monotonic())
        return msgspec.to_builtins(granted.grant)

    def watch(self, grant_id: str) -> list[int]:
        """When each layer was seen to be whole."""
        grants, arrived_ns = self.core.memory.grants, []
        for layer in range(self._num_layers):
            self._wait(partial(grants.layer_complete, grant_id, layer), grant_id)
            arrived_ns.append(time.monotonic_ns())
        return arrived_ns

    def commit(self, request_id: str, grant_id: str) -> int:
        """When all of it was prefix cache."""
        call_id = self._call()
        with self.core.lock:
            message = wire.Commit(call_id, request_id, grant_id, TIMEOUT_S)
            self.core.actions.commit(OWNER, message, time.monotonic())
        replies: list[Any] = []

        def is_answered() -> bool:
            self.core.step()
            replies.extend(reply for _, reply in self.core.take_output()[0].replies)
            return bool(replies)

        self._wait(is_answered)
        committed_ns = time.monotonic_ns()
        if not isinstance(replies[0], wire.Committed):
            raise InternalError(f"the commit was answered with {replies[0]}")
        return committed_ns

    def release(self, request_id: str, grant_id: str) -> int:
        """Give its blocks back; answers how many are free when no writer can reach any."""
        with self.core.lock:
            self.core.actions.release(
                OWNER, wire.Release(self._call(), request_id, grant_id), time.monotonic()
            )

        def is_drained() -> bool:
            self.core.step()
            self.core.take_output()
            return self.core.memory.pool.num_quarantined == 0

        self._wait(is_drained)
        return self.core.memory.pool.num_free

    def _wait(self, condition: Callable[[], bool], grant_id: str | None = None) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if time.monotonic() > deadline:
                reason = self.core.memory.grants.poisoned(grant_id) if grant_id else None
                raise TimeoutError(reason or f"nothing has come in {TIMEOUT_S:.0f} s")
            time.sleep(self._look_s)

    def _call(self) -> int:
        self._num_calls += 1
        return self._num_calls


class Receiver:
    """The process, as a context manager; ``ask`` and wait, or ``send`` now and ``answer`` later."""

    def __init__(self, layout: KvLayout, overrides: list[str], device: str) -> None:
        arguments = {"layout": msgspec.to_builtins(layout), "overrides": overrides, "device": device}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "gpu_parts.receiver", json.dumps(arguments)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        try:
            self.answer()
        except InternalError:
            self.close()
            raise

    def prepare(self, request_id: str, token_ids: list[int]) -> Grant:
        return msgspec.convert(self.ask("prepare", request_id=request_id, token_ids=token_ids), Grant)

    def ask(self, do: str, **arguments: Any) -> Any:
        self.send(do, **arguments)
        return self.answer()

    def send(self, do: str, **arguments: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode({"do": do, **arguments}) + b"\n")
        self._process.stdin.flush()

    def answer(self) -> Any:
        """Raises :class:`InternalError` if the process has ended or says nothing in time."""
        assert self._process.stdout is not None
        # One answer for one question, so no second line hides in the buffered reader.
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(TIMEOUT_S + 10.0):
                raise InternalError("the receiver does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise InternalError(f"the receiver has ended, exit code {self._process.wait()}")
        return msgspec.json.decode(line)

    def close(self) -> None:
        """It ends at the end of its stdin, or is made to."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def main() -> None:
    arguments = json.loads(sys.argv[1])
    configure("benchmark", "receiver", LogSettings(level="warning"))
    layout = msgspec.convert(arguments["layout"], KvLayout)
    commands = _Commands(layout, arguments["overrides"], arguments["device"])
    try:
        _say("ready")
        for line in sys.stdin:
            asked = msgspec.json.decode(line)
            command: Callable[..., Any] = getattr(commands, asked.pop("do"))
            _say(command(**asked))
    finally:
        commands.core.close()


def _say(value: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
