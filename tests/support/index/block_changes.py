"""What the KV events of an engine on paper say, and what it holds after them."""

from __future__ import annotations

Change = tuple[str, int]
"""``store`` or ``remove`` a block, or ``clear`` all."""
Changes = tuple[Change, ...]


def apply_changes(held: set[int], changes: Changes) -> None:
    for kind, block in changes:
        match kind:
            case "store":
                held.add(block)
            case "remove":
                held.discard(block)
            case "clear":
                held.clear()
