"""What kind of engine a core is: what its hello says of it beside model, pool and class (WIRE.md 4.3).

Plain data. A core has one; the shell says it, and routers and the conformance suite go by it, not by names.
"""

from __future__ import annotations

from dataclasses import dataclass

from microserve.protocol.messages.engine_info import ABILITIES, EARLY_START, GRAMMAR, LORA
from microserve.protocol.process.version import own_version

NATIVE = "native"


@dataclass(frozen=True, slots=True)
class EngineKind:
    """Fields of the same names in ``EngineInfo`` say what they mean."""

    backend: str
    backend_version: str
    can: tuple[str, ...]
    split_tokens: int = 1
    recompute_tokens: int = 0


def native_kind(*, has_guides: bool, is_hybrid: bool = False) -> EngineKind:
    """Ours: everything but adapters, grammars where nothing enforces them, and early starts of hybrid
    models."""
    missing = {LORA} if has_guides else {LORA, GRAMMAR}
    if is_hybrid:
        missing.add(EARLY_START)
    return EngineKind(NATIVE, own_version(), tuple(each for each in ABILITIES if each not in missing))
