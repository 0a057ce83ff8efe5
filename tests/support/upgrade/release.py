"""The release before, as it was: its services as processes beside those of this checkout.

``tests/data/microserve-VERSION.tar.xz`` is its code (tests/data/README.md says how it is made). It runs
in the environment that the tests run in.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from dataclasses import dataclass, field
from pathlib import Path

from microserve.services.local import leash
from tests.support.process.nursery import Process
from tests.support.process.processes import MeshProcesses

VERSION = "0.2.0"
ARCHIVE = Path(__file__).parents[2] / "data" / f"microserve-{VERSION}.tar.xz"
UNKNOWN_SETTINGS = ("bus.insecure=", "engine.cpu_kernels=", "gateway.drain_s=")
UNKNOWN_VARIABLES = ("MICROSERVE_ROUTER__CHECK_INTERVAL_S",)
"""It has none of these, and does what the tests want without them."""


def unpacked(directory: Path) -> Path:
    """Its ``PYTHONPATH``, made in ``directory``."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(directory, filter="data")
    return directory / ".src"


@dataclass
class MixedMesh(MeshProcesses):
    """Services that are named in ``old`` start as the release before, the others as this checkout."""

    release: Path = Path()
    """What :func:`unpacked` has made."""
    old: set[str] = field(default_factory=set)

    def spawn(self, name: str, arguments: list[str], log: Path) -> Process:
        if name not in self.old:
            return super().spawn(name, arguments, log)
        kind, *flags = arguments
        settings = [each for each in flags[1::2] if not each.startswith(UNKNOWN_SETTINGS)]
        words = [kind, *(word for each in settings for word in ("--set", each))]
        module = "microserve.services.command.main"
        tied = [sys.executable, "-S", "-E", str(leash.__file__), str(os.getpid())]
        known = {key: value for key, value in os.environ.items() if key not in UNKNOWN_VARIABLES}
        environment = {**known, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(self.release)}
        with log.open("w") as sink:
            return subprocess.Popen(
                [*tied, sys.executable, "-P", "-m", module, *words],
                stdout=sink,
                stderr=sink,
                env=environment,
                text=True,
            )


@dataclass
class RaisedMesh(MeshProcesses):
    """Services whose ``WIRE_VERSION`` is one more: what a change brings that WIRE.md 8 does not allow."""

    def spawn(self, name: str, arguments: list[str], log: Path) -> Process:
        raised = "import microserve.protocol.types as types; types.WIRE_VERSION += 1"
        code = f"{raised}; from microserve.services.command.main import main; main()"
        tied = [sys.executable, "-S", "-E", str(leash.__file__), str(os.getpid())]
        with log.open("w") as sink:
            return subprocess.Popen(
                [*tied, sys.executable, "-P", "-c", code, *arguments],
                stdout=sink,
                stderr=sink,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                text=True,
            )
