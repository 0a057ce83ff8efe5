"""Which MicroServe this is."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def own_version() -> str:
    """Empty: run from a checkout that nobody has installed."""
    try:
        return version("microserve")
    except PackageNotFoundError:
        return ""
