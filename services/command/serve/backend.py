"""What computes in an engine (``engine.backend``): which function runs it, and in whose Python.

Owns the step from our environment into vLLM's, whose torch and transformers are others than ours: the process
becomes that Python, with its id, its leash and its watchdog. Knows nothing of what vLLM does.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.services.command.shared.flags import WrongFlag

if TYPE_CHECKING:
    from microserve.protocol.process.run import Serve
    from microserve.protocol.settings.settings import Settings

RUNS = {
    "native": "service:run_engine",
    "vllm": "vllm.service:run_vllm_engine",
    "vllm-serve": "vllm.serve.service:run_serve_engine",
}
"""Module and function of each backend."""
ASK_TIMEOUT_S = 120.0
"""For a Python to say what is installed beside it, on a machine that is busy."""
_ASK = """
import importlib.util, sys
missing = [name for name in ("microserve", "vllm") if importlib.util.find_spec(name) is None]
sys.exit(" and ".join(missing) or None)
"""


def enter_environment(settings: Settings, arguments: Sequence[str]) -> None:
    """Become ``microserve ARGUMENTS`` in the Python of ``vllm.python``, if vLLM is to compute and it is not
    in this one. Raises :class:`WrongFlag` where that Python cannot be had, or lacks what it needs."""
    if settings.engine.backend != "vllm":
        return
    _set_threads(settings)
    python = settings.vllm.python
    if not python:
        return
    path = Path(python).expanduser().absolute()
    try:
        asked = subprocess.run(
            [path, "-P", "-c", _ASK], capture_output=True, text=True, timeout=ASK_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise WrongFlag(f"vllm.python {python!r} cannot be run: {error}") from None
    if asked.returncode != 0:
        said = asked.stderr.strip().rpartition("\n")[2]
        raise WrongFlag(
            f"vllm.python {python!r} is not an environment with vLLM and MicroServe: {said} is missing "
            "('make vllm' makes one, docs/engines.md says how by hand)"
        )
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(path, [str(path), "-P", "-m", "microserve.services", *arguments, "--set", "vllm.python="])


def _set_threads(settings: Settings) -> None:
    """Read by vLLM's processes when they start. Cores are the kernel's to give: vLLM would bind every engine
    of a machine to the same ones."""
    os.environ["OMP_NUM_THREADS"] = str(settings.engine.threads)
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def load_engine(backend: str) -> Serve:
    """Imports it."""
    module, _, name = RUNS[backend].partition(":")
    serve: Serve = getattr(import_module(f"microserve.services.engine.{module}"), name)
    return serve
