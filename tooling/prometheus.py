"""A Prometheus for `make boards`: the one that is installed; else Debian's package, unpacked, not installed.

python tooling/prometheus.py --into DIR

Nothing of the system changes, and no daemon is started. Where there is no apt, or no package, a line says so
and the tests that need it are skipped: exit code 0.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

NEEDED = ("prometheus", "promtool")
MISSING = "no prometheus here, and none to be had (apt-get install prometheus): what needs it is skipped"


def is_there(into: Path) -> bool:
    return all(shutil.which(name) or (into / "usr/bin" / name).exists() for name in NEEDED)


def unpack(into: Path) -> None:
    """Raises ``OSError`` and ``CalledProcessError``."""
    with tempfile.TemporaryDirectory() as scratch:
        fetch = ["apt-get", "download", "-qq", "prometheus"]
        if subprocess.run(fetch, cwd=scratch, capture_output=True, check=False).returncode:
            # It knows of no packages yet, which root alone can mend.
            subprocess.run(["apt-get", "update", "-qq"], capture_output=True, check=True)
            subprocess.run(fetch, cwd=scratch, capture_output=True, check=True)
        [package] = Path(scratch).glob("prometheus_*.deb")
        subprocess.run(["dpkg-deb", "--extract", package, into], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--into", type=Path, required=True)
    into = parser.parse_args().into
    if not is_there(into):
        try:
            unpack(into)
        except (OSError, subprocess.CalledProcessError):
            print(MISSING)
    return 0


if __name__ == "__main__":
    sys.exit(main())
