"""Why a request went where it went, in one line: the same words in ``tail`` and in ``top``."""

from __future__ import annotations


def why_line(why: str, *, alone: str = "", moves: int = 0, share: str = "") -> str:
    """``decode: e1 of 4 by cost; alone: no_transfer; moved 1x; canary``; of what is not recorded: that."""
    parts = [why or "not recorded"]
    if alone:
        parts.append(f"alone: {alone}")
    if moves:
        parts.append(f"moved {moves}x")
    if share == "canary":
        parts.append("canary")
    return "; ".join(parts)


def strategy_name(strategy: str, version: int = 0, share: str = "") -> str:
    """With its version, where it has one: ``auto 7 (canary)``."""
    told = f" {version}" if version else ""
    return f"{strategy or '-'}{told}{' (canary)' if share == 'canary' else ''}"
