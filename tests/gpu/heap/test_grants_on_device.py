"""Grants between processes whose KV is on one GPU: the tests of tests/kvcache, over the real driver."""

from __future__ import annotations

import pytest

from tests.kvcache.grant.test_grant_process import (  # noqa: F401
    receiver,
    spawn,
    test_a_stopped_writer_keeps_its_blocks_in_quarantine,
    test_a_writer_killed_in_quarantine_gives_the_blocks_back,
    test_a_writer_killed_within_a_transfer,
    test_no_late_write_ever_lands_in_a_block_in_use,
    test_two_processes_fill_one_grant,
)

pytestmark = pytest.mark.slow


@pytest.fixture
def factory() -> str:
    return "libcuda"
