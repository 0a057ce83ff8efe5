"""The engines as they were known at one moment: written down once, for all requests that saw them so.

Between two heartbeats of any engine nothing of it changes, and many requests come: what a record needs of an
engine is kept here as bytes, and the records share it. What changes with each request (what this router has
put where) is the record's own.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import msgspec

from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.strategy.decisions import EngineSeen
from microserve.services.router.engines.connection import Connection

Own = tuple[Sequence[int], Sequence[int], Sequence[int]]
"""As ``LoadBook.columns``, of the engines of a sight."""

_numbers = itertools.count(1)
_encode = msgspec.msgpack.Encoder().encode
_Kind = tuple[list[str] | None, Geometry, int, int, str, str]
"""What an engine is able to, as the last fields of ``EngineSeen``."""
_Columns = tuple[
    list[str], list[list[str]], list[Numerics], list[int], list[EngineLoad], list[float], list[_Kind]
]
_decode = msgspec.msgpack.Decoder(_Columns).decode


class Sight:
    """Some engines at one moment."""

    __slots__ = ("data", "engine_ids", "last_record", "number")

    def __init__(self, connections: Sequence[Connection], labels: Sequence[Sequence[str]]) -> None:
        """``labels``: those that count for the strategy, of each."""
        infos = [c.info for c in connections]
        self.engine_ids = [c.engine_id for c in connections]
        self.number = next(_numbers)
        self.last_record = 0
        """Number of the last record that names it."""
        self.data: bytes = _encode(
            (
                self.engine_ids,
                labels,
                [info.numerics for info in infos],
                [info.num_blocks for info in infos],
                [c.load for c in connections],
                [c.load_at for c in connections],
                [_kind_of(info) for info in infos],
            )
        )

    def seen(self, own: Own, at: float) -> list[EngineSeen]:
        """By a request that had these numbers of its router beside it, at that moment of the loop's clock."""
        ids, labels, numerics, num_blocks, loads, load_ats, kinds = _decode(self.data)
        tokens, sequences, transfers = own
        return [
            EngineSeen(
                engine_id,
                labels[n],
                numerics[n],
                num_blocks[n],
                tokens[n],
                sequences[n],
                transfers[n],
                loads[n],
                at - load_ats[n],
                *kinds[n],
            )
            for n, engine_id in enumerate(ids)
        ]


def _kind_of(info: EngineInfo) -> _Kind:
    return info.can, info.geometry, info.split_tokens, info.recompute_tokens, info.backend, info.cluster


class Sights:
    """The newest one, for as long as it is true. Of one router."""

    def __init__(self) -> None:
        self._newest: Sight | None = None
        self._connections: Sequence[Connection] = ()
        self._load_ats: Sequence[float] = ()

    def of(self, connections: Sequence[Connection]) -> Sight:
        """As the mesh sees them, whatever a strategy calls them itself."""
        load_ats = [c.load_at for c in connections]
        newest = self._newest
        if newest is None or load_ats != self._load_ats or connections != self._connections:
            newest = self._newest = Sight(connections, [c.labels for c in connections])
            self._connections, self._load_ats = [*connections], load_ats
        return newest

    def forget(self) -> None:
        """Engines have other labels now, and no heartbeat says so."""
        self._newest = None
