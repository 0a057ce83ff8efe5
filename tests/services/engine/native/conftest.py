"""A cache of packed weights of each test's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from microserve.services.engine.native import packed_cache


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of these tests; models are made a moment before they are read, which counts as settled here."""
    monkeypatch.setenv(packed_cache.CACHE_VARIABLE, str(tmp_path / "packed"))
    monkeypatch.setattr(packed_cache, "SETTLED_NS", -(10**9))
    monkeypatch.setattr(packed_cache, "COARSELY_SETTLED_NS", -(10**9))
    return tmp_path / "packed"
