"""An environment for each client: what its lock says and nothing else, made once and kept.

    python tests/support/clients/environment.py [CLIENT ...]     makes them
    python tests/support/clients/environment.py --lock [CLIENT ...]    resolves requirements.in anew

A client is a folder of tests/clients: ``requirements.in`` (what a user would install), ``requirements.txt``
(every package with its version), and for Node also ``package.json`` and ``package-lock.json``; where a file
``with-our-torch`` is there, this project's torch is lent to it. Environments lie in the user's cache, one a
client, and are made anew where a lock or the Python is another.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
CLIENTS = ROOT / "tests/clients"
INSIDE = Path(__file__).parent / "inside"
"""What scripts import beside their client."""
WITHOUT = Path(__file__).with_name("without.txt")
LENT = ("torch", "torch-*.dist-info", "torchgen", "functorch", "nvidia", "triton")
OLDEST_PYTHON = "3.11"
TIMEOUT_S = 900.0


def cache(environment: dict[str, str] | os._Environ[str] = os.environ) -> Path:
    home = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "microserve/clients"


def uv(*words: str, cwd: Path | None = None) -> None:
    """As it is installed beside this Python, or anywhere."""
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise FileNotFoundError("uv is not installed: `make clients` brings it")
    run([found, *words], cwd=cwd)


def run(command: list[str], *, cwd: Path | None = None, environment: dict[str, str] | None = None) -> None:
    """Its output is of interest only if it fails. Raises ``RuntimeError``."""
    done = subprocess.run(
        command,
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: exit {done.returncode}\n{done.stdout[-4000:]}")


@dataclass(frozen=True)
class Client:
    name: str
    """Of its folder."""

    @property
    def folder(self) -> Path:
        return CLIENTS / self.name

    @property
    def script(self) -> Path:
        return self.folder / ("client.mjs" if self.is_node else "client.py")

    @property
    def is_node(self) -> bool:
        return (self.folder / "package.json").exists()

    @property
    def locks(self) -> list[Path]:
        return [self.folder / name for name in ("requirements.txt", *(["package-lock.json"] * self.is_node))]

    @property
    def home(self) -> Path:
        return cache() / self.name

    def command(self, directory: Path) -> list[str]:
        """What runs the script. Node looks for packages beside it: a copy lies in ``directory`` then."""
        if not self.is_node:
            return [str(self.home / "bin/python"), str(self.script)]
        (directory / "node_modules").symlink_to(self.home / "node/node_modules")
        for path in (self.script, INSIDE / "checks.mjs"):
            shutil.copy(path, directory)
        return [str(self.home / "bin/node"), str(directory / self.script.name)]

    def digest(self) -> str:
        parts = [path.read_bytes() for path in self.locks]
        return hashlib.sha256(b"\0".join([sys.version.encode(), *parts])).hexdigest()

    @contextmanager
    def environment(self) -> Iterator[None]:
        """It is there, and stays as it is."""
        self.home.parent.mkdir(parents=True, exist_ok=True)
        with (self.home.parent / f"{self.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self._is_made():
                self._make()
            if (self.folder / "with-our-torch").exists():
                self._lend_torch()
            fcntl.flock(lock, fcntl.LOCK_SH)
            yield

    def _is_made(self) -> bool:
        stamp = self.home / "made-of"
        python = self.home / "bin/python"  # a link to one that may have gone since
        return stamp.exists() and stamp.read_text() == self.digest() and python.exists()

    def _make(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        uv("venv", "--quiet", "--no-project", "--python", sys.executable, str(self.home))
        python = str(self.home / "bin/python")
        lock = str(self.folder / "requirements.txt")
        uv("pip", "install", "--quiet", "--python", python, "--no-deps", "--requirements", lock)
        if self.is_node:
            self._make_node()
        (self.home / "made-of").write_text(self.digest())

    def _lend_torch(self) -> None:
        """Gigabytes, of a build for this machine: not once more. Each time anew: the environment outlives the
        checkout that lent its own before."""
        spec = importlib.util.find_spec("torch")
        assert spec is not None and spec.origin is not None
        ours = Path(spec.origin).parents[1]
        [theirs] = self.home.glob("lib/python*/site-packages")
        for path in theirs.iterdir():
            if path.is_symlink():
                path.unlink()
        for name in LENT:
            for path in ours.glob(name):
                (theirs / path.name).symlink_to(path)

    def _make_node(self) -> None:
        """Node itself is one of the requirements, with its npm: no other one need be on the machine."""
        packages = self.home / "node"
        packages.mkdir()
        for name in ("package.json", "package-lock.json"):
            shutil.copy(self.folder / name, packages)
        environment = {**os.environ, "PATH": f"{self.home / 'bin'}:{os.environ['PATH']}"}
        words = ["ci", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
        run([str(self.home / "bin/npm"), *words], cwd=packages, environment=environment)

    def lock(self) -> None:
        flags = ["--quiet", "--no-header", "--no-annotate", "--universal", "--python-version", OLDEST_PYTHON]
        flags += ["--override", str(WITHOUT), "--upgrade"]
        uv("pip", "compile", *flags, "requirements.in", "-o", "requirements.txt", cwd=self.folder)


def clients() -> list[Client]:
    return [Client(path.parent.name) for path in sorted(CLIENTS.glob("*/requirements.in"))]


def make_or_lock(about: str | None, known: Sequence[Client]) -> None:
    """What the command line asks for, of these."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all, if none is named")
    parser.add_argument("--lock", action="store_true")
    arguments = parser.parse_args()
    for each in known:
        if arguments.names and each.name not in arguments.names:
            continue
        print(each.name, flush=True)
        if not arguments.lock:
            with each.environment():
                pass
        elif (each.folder / "requirements.in").exists():
            each.lock()


if __name__ == "__main__":
    make_or_lock(__doc__, clients())
