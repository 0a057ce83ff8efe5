"""What strangers can cost: the floods of case B4 against a real index, with keys and without."""

from __future__ import annotations

from pathlib import Path

import pytest

from microserve.protocol.bus.curve import create_keys
from tests.support.security.flood import FLOODS, MIB, Flood, index_process, peak_nbytes

pytestmark = [pytest.mark.system, pytest.mark.timeout(120)]

MAX_MIB = 400
"""They cost 900 to 3,000 in as many seconds while nothing bounded them, and 0 to 150 now."""


@pytest.mark.parametrize(("name", "flood", "num_connections", "has_keys"), FLOODS, ids=[f[0] for f in FLOODS])
def test_a_flood_costs_little_memory_and_ends_nothing(
    tmp_path: Path, name: str, flood: Flood, num_connections: int, has_keys: bool
) -> None:
    create_keys(tmp_path / "keys")
    settings = [f"bus.curve_dir={tmp_path / 'keys'}"] if has_keys else []
    with index_process(tmp_path, settings) as (pid, address):
        peak = peak_nbytes(pid, address, flood, num_connections=num_connections, seconds=4.0)
    assert peak < MAX_MIB * MIB, f"{name}: {peak / MIB:.0f} MiB"
    log = "".join(path.read_text() for path in tmp_path.glob("index.*.log"))
    assert '"service.stopped"' in log, "and it ended when it was asked to"
