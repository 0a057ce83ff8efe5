"""Engines that are no members, and why: those that were refused, those that were lost. Sans-I/O.

For who asks what is wrong. Owns what is remembered, and for how long; admits nobody (membership.py does).
"""

from __future__ import annotations

import msgspec

from microserve.protocol.bus.peers import Loss
from microserve.protocol.bus.transport import Bus, ZmqBus
from microserve.protocol.errors import EngineLost, MeshError
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.messages.index import IndexReport, MissingEngine
from microserve.protocol.process.host import host_facts

MAX_MISSING = 64
REFUSED_S = 60.0
"""A refused engine asks for ever, and more often than this: one that does not is gone."""
LOST_S = 3600.0
_WHY = {Loss.SILENT: "fell silent", Loss.STUCK: "has work and makes no progress"}


class Missing:
    """By engine id and life; the oldest are forgotten first."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int], tuple[MissingEngine, float]] = {}

    def refused(self, info: EngineInfo, error: MeshError, now: float) -> None:
        self._add(info, error.code, error.field or "", error.detail, now)

    def lost(self, info: EngineInfo, loss: Loss, now: float) -> None:
        self._add(info, EngineLost.code, "", _WHY[loss], now)

    def present(self, info: EngineInfo) -> None:
        """It is a member: no life of it is lost any more, and this one is not refused. Another one may be."""
        for key, (each, _) in list(self._known.items()):
            if key[0] == info.engine_id and (key[1] == info.incarnation or not each.field):
                del self._known[key]

    def report(self, now: float) -> list[MissingEngine]:
        """Those that are still missing, with how long ago that was known last."""
        told = []
        for key, (each, at) in list(self._known.items()):
            is_refused = bool(each.field) or each.code != EngineLost.code
            if now - at > (REFUSED_S if is_refused else LOST_S):
                del self._known[key]
            else:
                told.append(_aged(each, now - at))
        return told

    def told_in(self, report: IndexReport, bus: Bus, now: float) -> IndexReport:
        """``report``, with what there is to say of who is not here, of strangers, and of this machine."""
        keys = bus.refused_keys if isinstance(bus, ZmqBus) else {}  # a bus of a simulation has no keys
        missing = self.report(now)
        return msgspec.structs.replace(report, missing=missing, refused_keys=keys, host=host_facts())

    def _add(self, info: EngineInfo, code: str, field: str, detail: str, now: float) -> None:
        key = (info.engine_id, info.incarnation)
        self._known.pop(key, None)
        if len(self._known) >= MAX_MISSING:
            del self._known[next(iter(self._known))]
        missing = MissingEngine(info.engine_id, info.incarnation, info.address, code, field, detail)
        self._known[key] = (missing, now)


def _aged(missing: MissingEngine, age_s: float) -> MissingEngine:
    return msgspec.structs.replace(missing, age_s=age_s)
