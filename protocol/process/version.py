"""Which MicroServe this is."""

from __future__ import annotations

from functools import cache
from importlib.metadata import PackageNotFoundError, version


@cache
def own_version() -> str:
    """Empty: run from a checkout that nobody has installed. Read once: a process stays what it was started
    as, and each look parses the package's metadata, two milliseconds long.
    """
    try:
        return version("microserve")
    except PackageNotFoundError:
        return ""
