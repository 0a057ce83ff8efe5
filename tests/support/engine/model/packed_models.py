"""Models that are packed, kept and found as an engine does it."""

from __future__ import annotations

from pathlib import Path

from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.loading import Loading
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.room import PACKED_SUFFIX


def loading(model: Path, *more: str) -> Loading:
    """``more``: settings."""
    return Loading(load_settings(overrides=[f"model.path={model}", *more]))


def load(model: Path, *more: str) -> PackedModel:
    """As an engine does: what is there, else all of it."""
    way = loading(model, *more)
    found = way.find() or way.load()[0]
    assert isinstance(found, PackedModel)
    return found


def files(cache: Path) -> list[Path]:
    return sorted(cache.glob(f"*{PACKED_SUFFIX}"))


def is_mapped(model: PackedModel) -> bool:
    return not model.weights.memory.flags.writeable
