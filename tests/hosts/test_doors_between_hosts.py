"""Heaps between two networks: both conformance suites, and a cable that is cut, for each kind of door."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.support.kvcache.heap.heap_child import ROOT

HEAPS = "tests/kvcache/heap/test_heap_conformance.py"
GRANTS = "tests/kvcache/grant/test_grant_process.py"
CUT = "tests/kvcache/heap/doors/test_cut_network.py"
KINDS = [
    "tcp",
    pytest.param("nixl", marks=pytest.mark.skipif(find_spec("nixl") is None, reason="needs the extra nixl")),
]


def run_between_networks(file: str, chosen: str) -> None:
    """A file of tests in one network, whose children are in the other one."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file, "-k", chosen]
    done = subprocess.run(
        ["sh", "tests/support/kvcache/networks.sh", *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-500:]


@pytest.mark.parametrize("kind", KINDS)
def test_the_promises_of_heaps(kind: str) -> None:
    run_between_networks(HEAPS, f"TestHeapProcess and {kind} and not 3000 and not 500")


@pytest.mark.parametrize("kind", KINDS)
def test_grants(kind: str) -> None:
    run_between_networks(GRANTS, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_cable_that_is_cut(kind: str) -> None:
    run_between_networks(CUT, kind)
