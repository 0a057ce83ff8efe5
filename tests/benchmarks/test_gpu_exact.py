"""gpu_exact.py on a CPU, where both sides are the same engine: every row is there, and nothing is judged."""

from __future__ import annotations

from collections.abc import Iterator

import gpu_exact
import pytest
import structlog
from gpu_parts.plan import TRIAL

from microserve.protocol.logging.setup import current


@pytest.fixture(autouse=True)
def own_log() -> Iterator[None]:
    """It sets the process's log up, which others of this process must not inherit."""
    yield
    if (made := current()) is not None:
        made.close()
    structlog.reset_defaults()


def test_every_row_has_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_exact.main(["--device", "cpu", "--tiny"]) == 0
    out = capsys.readouterr().out
    assert "both sides are the same" in out
    assert out.splitlines()[-1] == "nothing about GPUs was measured"
    rows = [line for line in out.splitlines() if "plain " in line]
    assert len(rows) == len(TRIAL.decodes) + 1
    assert all("<= 1.5 x" in row and "met" not in row for row in rows)
