"""vLLM's own server beside a mesh of vLLM engines: the same model, memory and limits on both sides.

Owns what both sides are told, in the words of each, and the processes of ``vllm serve``, which end with the
context.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine_parts.serving import Mesh

from microserve.services.local.composition import free_ports

PYTHON = Path(__file__).resolve().parents[3] / ".vllm/bin/python"
"""What ``make vllm`` makes."""
START_S = 600.0
REST_S = 1.2
"""vLLM's processes turn for a second behind their last step, each on a core (``busy_loop_s`` of its
shared-memory queue): a side that takes its turn sooner shares the machine with the other one."""


def rest() -> None:
    """Before a turn: until the other side is at rest."""
    time.sleep(REST_S)


@dataclass(frozen=True)
class Shape:
    """One thread, bfloat16, eager, prefix caching on, no statistics: the same for both sides."""

    max_num_batched_tokens: int
    block_size: int = 32
    kv_mb: int = 256
    max_model_len: int = 2048
    max_num_seqs: int = 64

    def flags(self) -> list[str]:
        """Of ``vllm serve``."""
        words = f"--dtype bfloat16 --block-size {self.block_size} --kv-cache-memory-bytes {self.kv_mb << 20}"
        words += f" --max-model-len {self.max_model_len} --max-num-seqs {self.max_num_seqs} --enforce-eager"
        words += f" --max-num-batched-tokens {self.max_num_batched_tokens} --enable-prefix-caching"
        return [*words.split(), "--disable-uvicorn-access-log"]

    def settings(self, python: Path) -> list[str]:
        """Of a mesh; thread and dtype are :func:`~engine_parts.serving.mesh`'s."""
        return [
            "engine.backend=vllm",
            f"vllm.python={python}",
            f"kvcache.block_size={self.block_size}",
            "kvcache.num_blocks=0",
            f"vllm.kv_cache_mb={self.kv_mb}",
            "vllm.enforce_eager=true",
            f"engine.max_model_len={self.max_model_len}",
            f"engine.max_num_seqs={self.max_num_seqs}",
            f"engine.max_num_batched_tokens={self.max_num_batched_tokens}",
            f"mesh.ready_timeout_s={START_S}",
        ]


class Server:
    """``vllm serve`` that may still be starting."""

    def __init__(self, child: subprocess.Popen[bytes], output: Path, port: int) -> None:
        self._child, self._output, self.port = child, output, port

    def ready(self) -> Mesh:
        """Waits for it. Raises :class:`RuntimeError` with what it said last."""
        url, until = f"http://127.0.0.1:{self.port}", time.monotonic() + START_S
        while not _answers(f"{url}/health"):
            if self._child.poll() is not None or time.monotonic() > until:
                raise RuntimeError(self._output.read_text(errors="replace")[-4000:])
            time.sleep(0.2)
        return Mesh(url)

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """All of its processes stand still: what it does at rest is no part of another side's figure."""
        os.killpg(self._child.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._child.pid, signal.SIGCONT)


@contextmanager
def vllm_serve(
    python: Path,
    model: str,
    shape: Shape,
    *more: str,
    environment: Mapping[str, str] | None = None,
    has_stats: bool = False,
) -> Iterator[Server]:
    """``more`` words of its command line and its environment; ``has_stats``: its ``/metrics`` say more."""
    [port] = free_ports(1)
    command = [str(python), "-P", "-m", "vllm.entrypoints.cli.main", "serve", model, *shape.flags()]
    command += ["--served-model-name", "bench", "--host", "127.0.0.1", "--port", str(port), *more]
    command += [] if has_stats else ["--disable-log-stats"]
    own = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", **(environment or {})}
    with tempfile.NamedTemporaryFile(prefix="vllm-serve-") as output:
        child = subprocess.Popen(
            command,
            env={**os.environ, **own},
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            process_group=0,
        )
        try:
            yield Server(child, Path(output.name), port)
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def metrics_of(url: str, prefix: str) -> dict[str, float]:
    """Samples of a server's ``/metrics`` whose names begin with ``prefix``, labels left out and summed."""
    found: dict[str, float] = {}
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as response:
        for line in response.read().decode().splitlines():
            if line.startswith(prefix):
                name, _, value = line.rpartition(" ")
                name = name.partition("{")[0]
                found[name] = found.get(name, 0.0) + float(value)
    return found


def has_module(python: Path, name: str) -> bool:
    """Does that interpreter find it?"""
    words = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({json.dumps(name)}) is None)"
    return subprocess.run([str(python), "-P", "-c", words], check=False).returncode == 0
