"""The lanes of tests/conftest.py name rooms that are there, and the quick one stays light."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import QUICK, ROOMS, TESTS

LIGHT = """
import sys, pytest
class Watch:
    def pytest_collection_finish(self, session):
        assert len(session.items) > 1000
        print("heavy:", sorted({"torch", "transformers", "triton"} & set(sys.modules)))
sys.exit(pytest.main(["-q", "--collect-only", "-m", "quick", "-p", "no:cacheprovider"], [Watch()]))
"""


def test_every_room_of_a_lane_is_there() -> None:
    assert [each for each in (*QUICK, *ROOMS) if not (TESTS / each).exists()] == []


def test_the_quick_lane_imports_nothing_heavy() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-P", "-c", LIGHT],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=TESTS.parent,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert "heavy: []" in done.stdout
