"""docs/metrics.md is as the tables say."""

from __future__ import annotations

import subprocess
import sys

from tests.test_packaging import ROOT


def test_the_page_is_as_the_tables_say() -> None:
    command = [sys.executable, str(ROOT / "tooling/metrics.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
