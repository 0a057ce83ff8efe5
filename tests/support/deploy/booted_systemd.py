"""A real systemd, booted in a container made by hand, with MicroServe installed and its units in place.

Needs root and a machine with systemd's files; :func:`missing` says in words what is not there. Nothing of the
machine can be written from inside (boot_systemd.sh says what it sees), and all of it ends with the process
that started it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path

END_S = 30.0
BOOT = Path(__file__).with_name("boot_systemd.sh")
NAMESPACES = ("--mount", "--pid", "--fork", "--cgroup", "--net", "--uts", "--ipc", "--kill-child")
ENTERED = ("mount", "pid", "net", "uts", "ipc", "cgroup", "root", "wd")
HIERARCHIES = [Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/systemd"), Path("/sys/fs/cgroup/unified")]
TOOLS = ("setpriv", "unshare", "nsenter", "pivot_root", "chroot", "ldconfig", "useradd", "systemctl")


def missing() -> str:
    """Why no systemd can be booted here; empty if it can be tried."""
    if os.geteuid() != 0:
        return "only root boots a systemd"
    if not Path("/lib/systemd/systemd").exists():
        return "no systemd on this machine"
    absent = [
        tool for tool in TOOLS if shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None
    ]
    if absent:
        return f"no {', '.join(absent)} on this machine"
    probe = subprocess.run(["unshare", *NAMESPACES, "true"], capture_output=True, text=True, check=False)
    return "" if probe.returncode == 0 else f"no namespaces here: {probe.stderr.strip()}"


class Booted:
    """Use as a context manager."""

    def __init__(self, folder: Path, units: Path, wheel: Path, model: Path) -> None:
        self._root, self._log = folder / "root", folder / "systemd.log"
        self._root.mkdir()
        self._own = [each / f"microserve-test-{os.getpid()}" for each in HIERARCHIES if _is_hierarchy(each)]
        self._arguments = [self._root, sys.base_prefix, sysconfig.get_path("purelib"), units, wheel, model]
        self._process: subprocess.Popen[bytes] | None = None
        self._init = 0

    def __enter__(self) -> Booted:
        for group in self._own:
            group.mkdir()
        join = " && ".join(f"echo $$ > {group}/cgroup.procs" for group in self._own)
        words = [
            "setpriv",
            "--pdeathsig=KILL",
            "unshare",
            *NAMESPACES,
            "bash",
            str(BOOT),
            *map(str, self._arguments),
        ]
        with self._log.open("wb") as log:
            # The shell joins the groups first: they are the roots of what systemd sees.
            self._process = subprocess.Popen(
                ["bash", "-c", f'{join} && exec "$@"', "boot", *words],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        if self._init:
            os.kill(self._init, signal.SIGKILL)  # the first of its processes takes all others along
        else:
            self._process.kill()
        self._process.wait()
        for group in self._own:
            _remove(group)

    @property
    def told(self) -> str:
        """What the boot printed, and the end of the journal."""
        journal = self.run("journalctl", "--no-pager", "--lines=80").stdout if self._init else ""
        return self._log.read_text(errors="replace") + journal

    def is_up(self) -> bool:
        """Whether systemctl is answered. Raises :class:`AssertionError` if the boot has failed."""
        assert self._process is not None
        assert self._process.poll() is None, self.told
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        if not children or Path(f"/proc/{children[0]}/comm").read_text().strip() != "systemd":
            return False
        self._init = int(children[0])
        return self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded")

    def run(
        self, *words: str, check: bool = False, timeout_s: float = 300.0
    ) -> subprocess.CompletedProcess[str]:
        """A command inside."""
        inside = ["nsenter", f"--target={self._init}", *(f"--{each}" for each in ENTERED)]
        environment = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "SYSTEMD_UNIT_PATH": "/etc/systemd/system"}
        done = subprocess.run(
            [*inside, "--", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert not check or done.returncode == 0, f"{words}: {done.stdout}{done.stderr}\n{self.told}"
        return done

    def write(self, path: str, text: str) -> None:
        self.run(
            "/bin/sh",
            "-c",
            f'mkdir -p {os.path.dirname(path)} && printf %s "$1" > {path}',
            "write",
            text,
            check=True,
        )

    def show(self, unit: str, *properties: str) -> Sequence[str]:
        """Values of a unit's properties, in that order."""
        return [
            self.run("systemctl", "show", unit, f"--property={name}", "--value").stdout.strip()
            for name in properties
        ]


def _is_hierarchy(folder: Path) -> bool:
    return (folder / "cgroup.procs").exists()


def _remove(group: Path) -> None:
    """The innermost first; a process that was killed is in its group for a moment longer."""
    deadline = time.monotonic() + END_S
    for folder, _, _ in os.walk(group, topdown=False):
        while True:
            try:
                os.rmdir(folder)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
