"""An adapter (LoRA) that an engine serves beside its model: a name for clients, and what it stands for."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

MAX_ADAPTERS = 32
"""Of one engine; they travel in every hello (index/membership.py bounds that)."""
MAX_ADAPTER_CHARS = 128
"""Of one name."""
MAX_ADAPTERS_CHARS = 1024
"""Of all names of one engine together."""


class Adapter(msgspec.Struct, frozen=True, array_like=True):
    name: str
    revision: str
    """Digest of its config and its weights, as they were loaded."""

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"


def adapter_named(name: str, adapters: Iterable[Adapter]) -> Adapter | None:
    """None: it is not there."""
    return next((adapter for adapter in adapters if adapter.name == name), None)


def fault_of_adapters(names: Iterable[str]) -> str:
    """What is wrong with these names; empty: nothing."""
    known = list(names)
    if len(known) > MAX_ADAPTERS:
        return f"at most {MAX_ADAPTERS} adapters, {len(known)} are named"
    for name in known:
        if not 0 < len(name) <= MAX_ADAPTER_CHARS:
            bounds = f"1 to {MAX_ADAPTER_CHARS} characters"
            return f"the name of an adapter has {bounds}, {name[:40]!r} has {len(name)}"
        if not name.isprintable() or name != name.strip():
            return f"the name of an adapter is printable, without a space at its ends; {name!r} is not"
    if (total := sum(map(len, known))) > MAX_ADAPTERS_CHARS:
        return f"the names of all adapters have at most {MAX_ADAPTERS_CHARS} characters, these have {total}"
    return ""
