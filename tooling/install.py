"""What ``make`` installs: one resolution, one torch, its CPU build where there is no GPU, a C++ compiler
where there is none; size and time said.

    python tooling/install.py --venv .venv --extras engine,demo [--torch REQUIREMENT] [--gpu auto|yes|no]

Run by any Python from 3.11 on, with nothing but its standard library. Owns which build of torch is asked for,
whether a compiler is, and what is said while pip works; what else is needed is pyproject.toml's. Exit codes:
0 installed, 1 not, 130 stopped.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TORCH = "2.13.0"
"""The version that all figures and tests are of."""
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""PyTorch's own index of builds for CPUs: on PyPI those for x86-64 Linux are CUDA builds."""
FOOTPRINT_MB = {"cpu": (300, 1_400), "cuda": (2_900, 5_500)}
"""Megabytes to download and on disk for engine and demo, by build of torch; measured 2026-11-29."""
DEV_MB = (400, 1_200)
"""On top of it, for tests and checks."""
COMPILER_MB = (100, 410)
"""On top of it, for the package ``ziglang``."""
COMPILERS = ("c++", "g++", "clang++")
PROGRAM = "#include <atomic>\nstd::atomic<int> n;\n"
"""That a compiler without its library does not compile."""
ASK_TIMEOUT_S = 10
SILENCE_S = 15.0
"""pip says nothing while it unpacks, which takes minutes for a CUDA build: then we say how far it is."""
MB = 1_000_000


class InstallFailed(Exception):
    """The text says why and what to do."""


@dataclass(frozen=True)
class Choice:
    requirement: str
    build: str
    """``cpu``, ``cuda``, or empty: the user's own word, of unknown size."""
    why: str
    extra_index: str = ""


def choose(
    asked: str,
    installed: str,
    has_gpu: bool,
    own: Iterable[str],
    official: Iterable[str],
    cpu_index: str = CPU_INDEX,
    machine: str = "x86_64",
) -> Choice:
    """Which torch. ``own``: versions that pip finds as it is configured; ``official``: with ``cpu_index``
    too. Both are asked only as far as they are needed. Raises :class:`InstallFailed`."""
    if asked:
        return Choice(asked, "", "as asked for by TORCH")
    if installed:
        build = "cpu" if "+cpu" in installed or machine != "x86_64" else "cuda"
        return Choice(f"torch=={installed}", build, f"{installed} is installed and stays")
    if has_gpu:
        return Choice(f"torch=={TORCH}", "cuda", "a CUDA build, as this machine has a GPU")
    if machine != "x86_64":
        return Choice(f"torch=={TORCH}", "cpu", f"the build for {machine}")
    cpu = f"{TORCH}+cpu"
    found = list(own)
    if cpu in found:
        return Choice(f"torch=={cpu}", "cpu", "the CPU build, as this machine has no GPU")
    more = list(official)
    if cpu in more:
        return Choice(f"torch=={cpu}", "cpu", "the CPU build, as this machine has no GPU", cpu_index)
    if TORCH not in found and TORCH not in more:
        raise InstallFailed(
            f"pip finds no torch {TORCH} for this Python ({platform.python_version()}): is the package index "
            "reachable (proxy? PIP_INDEX_URL?), and does it have a build for it?"
        )
    why = (
        f"a CUDA build although this machine has no GPU: {cpu_index} cannot be reached,\n"
        f"   or has no {cpu}. The CPU build takes a quarter of the room: Ctrl-C, and try again where that\n"
        f"   index is reached, or with a wheel of it:  make up TORCH=/path/to/torch-{cpu}-....whl"
    )
    return Choice(f"torch=={TORCH}", "cuda", why)


def has_gpu(root: Path = Path("/")) -> bool:
    """An NVIDIA device is there; a driver's files, or ``nvidia-smi``, may lie in a container without one."""
    subsystem = (root / "dev/dxg").exists() and (root / "usr/lib/wsl/lib/nvidia-smi").exists()
    return subsystem or any((root / "dev").glob("nvidia[0-9]*"))


def has_compiler(environment: Mapping[str, str]) -> bool:
    """A C++ compiler that works, or one that the user has named by ``$CXX``."""
    path = environment.get("PATH", os.defpath)
    found = [place for name in COMPILERS if (place := shutil.which(name, path=path))]
    return bool(environment.get("CXX")) or any(_compiles(each) for each in found)


def _compiles(compiler: str) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        words = [compiler, "-x", "c++", "-std=c++17", "-fPIC", "-shared", "-o", f"{folder}/it.so", "-"]
        try:
            done = subprocess.run(
                words, input=PROGRAM, capture_output=True, text=True, timeout=60, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0


class Environment:
    """A virtual environment at ``path``, made or mended first if need be."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin/python"
        # A setting for all environments of a user may stand in the way of this one.
        self._variables = {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        for name in ("PYTHONHOME", "PYTHONPATH", "PIP_TARGET", "PIP_PREFIX", "PIP_REQUIRE_VIRTUALENV"):
            self._variables.pop(name, None)

    def make(self) -> None:
        """Raises :class:`InstallFailed`."""
        is_environment = (self.path / "pyvenv.cfg").is_file()
        if not is_environment and self.path.exists() and any(self.path.iterdir()):
            raise InstallFailed(f"{self.path} is there and is no virtual environment; it is left as it is")
        if is_environment:
            if self._is_at_home() and self._answers("import pip"):
                return
            say(f"{self.path} was made elsewhere, or its Python has gone: it is made anew")
        command = [sys.executable, "-m", "venv", "--clear", str(self.path)]
        if subprocess.run(command, check=False).returncode != 0:
            raise InstallFailed(f"cannot make a virtual environment in {self.path}")

    def _is_at_home(self) -> bool:
        """Its scripts name its Python by a whole path, which ends with the folder's being moved."""
        try:
            head = (self.path / "bin/pip").read_text().splitlines()[:3]
        except OSError:
            return False
        places = (str(self.path.resolve()), str(self.path.absolute()))
        return any(f"{place}/bin/" in line for line in head for place in places)

    def torch(self) -> str:
        """The version of torch in it; empty if there is none, or half of one."""
        return self._answers("from importlib.metadata import version as v; print(v('torch'))").strip()

    def has(self, package: str) -> bool:
        return bool(self._answers(f"from importlib.metadata import version as v; print(v({package!r}))"))

    def versions(self, *options: str) -> list[str]:
        """Of torch, that pip finds for this Python; none if it finds none, or no index."""
        command = [*self._pip("index", "versions", "torch"), "--retries", "0", *options]
        command += ["--timeout", str(ASK_TIMEOUT_S)]
        done = subprocess.run(command, env=self._variables, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("Available versions:")]
        return [each.strip() for line in lines for each in line.partition(":")[2].split(",")]

    def install(self, *words: str) -> int:
        """pip as it is, with its progress; a word of ours where it is silent. Returns its exit code."""
        begin, size_mb, told = time.monotonic(), self.size_mb(), 0
        with subprocess.Popen([*self._pip("install"), *words], env=self._variables) as process:
            while True:
                try:
                    return process.wait(SILENCE_S)
                except subprocess.TimeoutExpired:
                    grown = self.size_mb() - size_mb
                    if grown > told + 20:
                        say(f"unpacking: {grown} MB on disk so far, {time.monotonic() - begin:.0f} s")
                        told = grown

    def size_mb(self) -> int:
        files = (os.path.join(folder, name) for folder, _, names in os.walk(self.path) for name in names)
        return sum(_nbytes(file) for file in files) // MB

    def _pip(self, *words: str) -> list[str]:
        return [str(self.python), "-m", "pip", *words]

    def _answers(self, program: str) -> str:
        """What ``program`` prints there, or a blank for nothing; empty if it fails."""
        try:
            done = subprocess.run(
                [self.python, "-c", program], env=self._variables, capture_output=True, text=True, check=False
            )
        except OSError:  # no such file, or a link to a Python that has gone
            return ""
        return (done.stdout or " ") if done.returncode == 0 else ""


def _nbytes(file: str) -> int:
    try:
        return os.lstat(file).st_size
    except OSError:  # gone by now
        return 0


def check_room(disk_mb: int, download_mb: int, venv: Path, scratch: Path) -> None:
    """Raises :class:`InstallFailed` where a disk has not that much room. pip's cache takes the downloads once
    more, and does without where there is no room."""
    place = next(each for each in (venv.absolute(), *venv.absolute().parents) if each.is_dir())
    both = place.stat().st_dev == scratch.stat().st_dev
    needs = [(place, disk_mb + download_mb)] if both else [(place, disk_mb), (scratch, download_mb)]
    for folder, needed_mb in needs:
        free_mb = shutil.disk_usage(folder).free // MB
        if free_mb < needed_mb:
            raise InstallFailed(
                f"{needed_mb / 1000:.1f} GB are needed in {folder}, {free_mb / 1000:.1f} GB are free there"
                + ("" if folder == place else " (TMPDIR says where pip puts what it downloads)")
            )


def say(text: str) -> None:
    print(f"== {text}", flush=True)


def install(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    dev = "dev" in options.extras.split(",")
    if not dev and (sys.platform, platform.machine()) != ("linux", "x86_64"):
        raise InstallFailed(
            f"MicroServe runs on x86-64 Linux only, not on {platform.machine()} {sys.platform}"
        )
    with alone(options.venv):
        install_alone(options, Environment(options.venv), dev, begin)


@contextmanager
def alone(venv: Path) -> Iterator[None]:
    """One at a time beside ``venv``: two would take each other's files away."""
    venv.absolute().parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(venv.absolute().parent, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process installs beside {venv}: waiting for it")
            fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def install_alone(options: argparse.Namespace, environment: Environment, dev: bool, begin: float) -> None:
    environment.make()
    torch, gpu = environment.torch(), has_gpu() if options.gpu == "auto" else options.gpu == "yes"
    extra = ("--extra-index-url", options.cpu_index)
    needs_answer = not (options.torch or torch or gpu or platform.machine() != "x86_64")
    if needs_answer:
        say(f"asking for builds of torch {TORCH}")
    own = environment.versions() if needs_answer else []
    official = environment.versions(*extra) if needs_answer and f"{TORCH}+cpu" not in own else []
    choice = choose(options.torch, torch, gpu, own, official, options.cpu_index, platform.machine())
    say(f"torch: {choice.why}")
    extras = options.extras
    if needs_zig := "engine" in extras.split(",") and not has_compiler(os.environ):
        extras += ",compiler"
        say("no C++ compiler that works is here: the package ziglang compiles the CPU's kernels")
    if choice.build:
        parts = [FOOTPRINT_MB[choice.build]] if not torch else []
        parts += [DEV_MB] if dev else []
        parts += [COMPILER_MB] if needs_zig and not environment.has("ziglang") else []
        download, disk = sum(part[0] for part in parts), sum(part[1] for part in parts)
        if parts:
            say(f"about {download / 1000:.1f} GB to download, {disk / 1000:.1f} GB on disk in {options.venv}")
        check_room(disk, download, options.venv, Path(tempfile.gettempdir()))
    project = f"{options.project}[{extras}]"
    words = [choice.requirement, *(["--editable"] if options.editable else []), project]
    if environment.install(
        *(["--extra-index-url", choice.extra_index] if choice.extra_index else []), *words
    ):
        raise InstallFailed(
            "pip could not install all of it: its last lines say why; the same command goes on"
        )
    size_mb, seconds = environment.size_mb(), time.monotonic() - begin
    say(f"installed: torch {environment.torch()}, {size_mb / 1000:.1f} GB in {options.venv}, {seconds:.0f} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--venv", type=Path, required=True)
    parser.add_argument("--extras", required=True)
    parser.add_argument("--torch", default="", metavar="REQUIREMENT")
    parser.add_argument("--gpu", choices=["auto", "yes", "no"], default="auto")
    parser.add_argument("--cpu-index", default=CPU_INDEX, metavar="URL")
    parser.add_argument("--project", default=str(Path(__file__).parents[1]), metavar="DIR")
    parser.add_argument("--no-editable", dest="editable", action="store_false")
    try:
        install(parser.parse_args())
    except (InstallFailed, OSError) as error:
        print(f"Error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
