"""``engine.backend``: which function computes, and how an engine becomes the Python that vLLM is in."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from microserve.protocol.settings.engine import BACKENDS, EngineSettings
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.vllm import VllmSettings
from microserve.services.command.serve import backend
from microserve.services.command.shared.flags import WrongFlag

pytestmark = pytest.mark.slow


def python(directory: Path, *, missing: str = "") -> Path:
    """A program in the place of a Python: it says that ``missing`` is missing, or with what it was run."""
    file = directory / "python"
    file.write_text(
        f"""#!/bin/sh
if [ "$2" = -c ]; then echo '{missing}' >&2; exit {int(bool(missing))}; fi
printf '%s\\n' "$OMP_NUM_THREADS" "$VLLM_CPU_OMP_THREADS_BIND" "$$" "$@"
"""
    )
    file.chmod(0o755)
    return file


def engine(*words: str, **environment: str) -> tuple[int, subprocess.Popen[str], str, str]:
    command = [sys.executable, "-P", "-m", "microserve.services", "engine", *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    out, err = process.communicate()
    return process.returncode, process, out, err


def test_the_process_becomes_vllms_python_with_its_flags_and_its_own_id(tmp_path: Path) -> None:
    there = python(tmp_path)
    words = ["--backend", "vllm", "--id", "e7", "--set", f"vllm.python={there}", "--set", "engine.threads=3"]
    code, process, out, _ = engine(*words, "--directory", str(tmp_path), VLLM_CPU_OMP_THREADS_BIND="0")
    assert code == 0
    threads, bind, pid, *argv = out.splitlines()
    assert (threads, bind, int(pid)) == ("3", "0", process.pid)
    assert argv[:4] == ["-P", "-m", "microserve.services", "engine"]
    assert argv[-4:] == ["--directory", str(tmp_path), "--set", "vllm.python="]
    assert 'engine.id="e7"' in argv and 'engine.backend="vllm"' in argv


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda directory: python(directory, missing="vllm"), "vllm is missing"),
        (lambda directory: directory / "absent", "cannot be run: [Errno 2]"),
    ],
)
def test_a_python_without_what_is_needed_is_a_wrong_setting(tmp_path: Path, make, reason: str) -> None:  # type: ignore[no-untyped-def]
    there = make(tmp_path)
    code, _, out, err = engine("--backend", "vllm", "--set", f"vllm.python={there}")
    assert (code, out) == (2, "")
    assert f"vllm.python '{there}'" in err and reason in err


def test_others_stay_in_the_python_that_they_are_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "execv", lambda *_: pytest.fail("became another program"))
    for name in ("native", "vllm-serve"):
        settings = Settings(engine=EngineSettings(backend=name), vllm=VllmSettings(python=str(tmp_path)))
        backend.enter_environment(settings, [])
    monkeypatch.setenv("OMP_NUM_THREADS", "9")
    here = Settings(engine=EngineSettings(backend="vllm", threads=2))
    backend.enter_environment(here, [])
    assert os.environ["OMP_NUM_THREADS"] == "2"


def test_every_backend_has_its_function() -> None:
    assert backend.RUNS.keys() == set(BACKENDS)
    assert backend.load_engine("native").__name__ == "run_engine"


def test_wrong_flag_is_what_an_absent_python_raises(tmp_path: Path) -> None:
    settings = Settings(engine=EngineSettings(backend="vllm"), vllm=VllmSettings(python=str(tmp_path)))
    with pytest.raises(WrongFlag, match="cannot be run"):
        backend.enter_environment(settings, [])
