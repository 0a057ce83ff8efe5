"""Who is in the mesh: sans-I/O state of the index (WIRE.md 6).

Owns which life of which engine is a member, why one is refused, and when one is lost. Knows no sockets, no
prefixes and no watchers; time comes in as ``now`` (monotonic seconds).

    Register ──► member ──silent, stuck──► absent ──Beat──► Unknown: register again
                   ▲                          │             (a stuck life: once its progress has moved)
                   └─────────Register─────────┤
                                              └──another life registers──► retired: refused for ever
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import Enum

import msgspec

from microserve.protocol.bus.liveness import LivenessBook, Loss
from microserve.protocol.errors import EngineLost, InvalidRequest, QueueFull
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.index import Member
from microserve.protocol.types import MAX_REQUEST_ID_CHARS, WIRE_VERSION

MAX_MEMBERS = 1024
MAX_INFO_NBYTES = 4096
"""Times ``MAX_MEMBERS`` this is half of the longest message frame, so ``Members`` always fits into one."""
MAX_RETIRED_LIVES = 16
"""Lives remembered per engine id after they were replaced; a zombie among them is refused."""
MAX_REMEMBERED_ENGINES = 4096
"""Engine ids remembered after they left; the oldest are forgotten first."""


class Admission(Enum):
    """What a ``Register`` that was let in has changed."""

    JOINED = "joined"
    REPLACED = "replaced"
    """A new life of an engine id whose older life was still a member."""
    RENEWED = "renewed"
    """The same life again; nothing has changed."""


@dataclass(frozen=True, slots=True)
class _Absent:
    """The last life of an engine that was lost; it may still come back."""

    incarnation: int
    stuck_at: int | None
    """Progress counter of a life that was stuck: until it moves, the life is not let in."""


class Membership:
    """Engines by id, each with one life; ``version`` grows with every change of who is in."""

    def __init__(self, *, silence_s: float, stuck_s: float) -> None:
        self.version = 0
        self._book = LivenessBook(silence_s=silence_s, stuck_s=stuck_s)
        self._members: dict[str, Member] = {}
        self._absent: dict[str, _Absent] = {}
        self._retired: dict[str, deque[int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def members(self) -> list[Member]:
        """Every member with its latest load, by engine id."""
        return [self._members[engine_id] for engine_id in sorted(self._members)]

    def info(self, engine_id: str) -> EngineInfo | None:
        member = self._members.get(engine_id)
        return member.info if member else None

    def register(self, info: EngineInfo, now: float) -> Admission:
        """Let an engine in.

        Raises :class:`InvalidRequest` naming the field and both values when it does not fit the mesh,
        :class:`EngineLost` for a life that was replaced or is stuck, :class:`QueueFull` beyond
        ``MAX_MEMBERS``.
        """
        self._check(info)
        engine_id = info.engine_id
        present = self._members.get(engine_id)
        if present is not None and present.info.incarnation == info.incarnation:
            if present.info != info:
                raise InvalidRequest(
                    f"{engine_id} registered as {present.info} and now as {info}; what an engine is "
                    "does not change in its life",
                    field="info",
                )
            self._book.heard(engine_id, info.incarnation, now)
            return Admission.RENEWED
        if present is None and len(self._members) >= MAX_MEMBERS:
            raise QueueFull(f"{MAX_MEMBERS} engines are in the mesh already", retry_after_s=1.0)
        absent = self._absent.pop(engine_id, None)
        previous = present.info.incarnation if present else absent.incarnation if absent else None
        if previous is not None and previous != info.incarnation:
            self._retire(engine_id, previous)
        self._members[engine_id] = Member(info, EngineLoad())
        self._book.joined(engine_id, info.incarnation, now)
        self.version += 1
        return Admission.JOINED if present is None else Admission.REPLACED

    def beat(self, engine_id: str, incarnation: int, load: EngineLoad, now: float) -> bool:
        """Take a heartbeat. False: answer ``Unknown``, so that a living engine registers (again)."""
        if self._book.heard(engine_id, incarnation, now):
            self._book.progressed(engine_id, progress=load.progress, busy=is_busy(load), now=now)
            self._members[engine_id] = Member(self._members[engine_id].info, load)
            return True
        absent = self._absent.get(engine_id)
        if absent is None or absent.incarnation != incarnation or absent.stuck_at is None:
            return False
        if is_busy(load) and load.progress == absent.stuck_at:
            return True
        self._absent[engine_id] = _Absent(incarnation, None)
        return False

    def deregister(self, engine_id: str, incarnation: int) -> bool:
        """A clean leave; that life does not return. False if it is no member."""
        if self._book.incarnation(engine_id) != incarnation:
            return False
        self._remove(engine_id)
        self._retire(engine_id, incarnation)
        return True

    def expire(self, now: float) -> list[tuple[EngineInfo, Loss]]:
        """Remove and return the silent and the stuck."""
        lost: list[tuple[EngineInfo, Loss]] = []
        for engine_id, loss in self._book.expire(now):
            member = self._members[engine_id]
            lost.append((member.info, loss))
            self._remove(engine_id)
            stuck_at = member.load.progress if loss is Loss.STUCK else None
            _forget_oldest(self._absent)
            self._absent[engine_id] = _Absent(member.info.incarnation, stuck_at)
        return lost

    def _remove(self, engine_id: str) -> None:
        del self._members[engine_id]
        self._book.left(engine_id)
        self.version += 1

    def _retire(self, engine_id: str, incarnation: int) -> None:
        lives = self._retired.pop(engine_id, None)
        if lives is None:
            lives = deque(maxlen=MAX_RETIRED_LIVES)
            _forget_oldest(self._retired)
        lives.append(incarnation)
        self._retired[engine_id] = lives

    def _check(self, info: EngineInfo) -> None:
        """Compare an engine with the wire, with its own past and with the members that serve its model."""

        def refuse(field: str, theirs: object, ours: object, whose: str) -> InvalidRequest:
            return InvalidRequest(
                f"{info.engine_id} has {field} {theirs!r}, {whose} has {ours!r}; they must agree", field=field
            )

        if info.wire_version != WIRE_VERSION:
            raise refuse("wire_version", info.wire_version, WIRE_VERSION, "the index")
        if not 1 <= len(info.engine_id) <= MAX_REQUEST_ID_CHARS:
            raise InvalidRequest(
                f"engine_id must have 1 to {MAX_REQUEST_ID_CHARS} characters, has {len(info.engine_id)}",
                field="engine_id",
            )
        nbytes = len(msgspec.msgpack.encode(info))
        if nbytes > MAX_INFO_NBYTES:
            raise InvalidRequest(f"info must be at most {MAX_INFO_NBYTES} bytes, is {nbytes}", field="info")
        for field in ("incarnation", "block_size", "num_blocks", "vocab_size"):
            if getattr(info, field) < 1:
                raise InvalidRequest(f"{field} must be at least 1, is {getattr(info, field)}", field=field)
        for field in ("model", "address", "events_address"):
            if not getattr(info, field):
                raise InvalidRequest(f"{field} must not be empty", field=field)
        if info.incarnation in self._retired.get(info.engine_id, ()):
            raise EngineLost(
                f"life {info.incarnation} of {info.engine_id} has left or was replaced", field="incarnation"
            )
        absent = self._absent.get(info.engine_id)
        if absent and absent.incarnation == info.incarnation and absent.stuck_at is not None:
            raise EngineLost(
                f"{info.engine_id} has work and its progress stands still at {absent.stuck_at}",
                field="progress",
            )
        for member in self._members.values():
            other = member.info
            if other.model != info.model or other.engine_id == info.engine_id:
                continue
            for field in ("block_size", "layout_hash", "vocab_size"):
                if getattr(info, field) != getattr(other, field):
                    raise refuse(field, getattr(info, field), getattr(other, field), other.engine_id)

    def check_integrity(self) -> None:
        """Assert what must hold between any two events (tests call it after each)."""
        assert len(self._book) == len(self._members) <= MAX_MEMBERS
        assert not self._absent.keys() & self._members.keys(), "a member is not absent"
        for engine_id, member in self._members.items():
            incarnation = member.info.incarnation
            assert self._book.incarnation(engine_id) == incarnation
            assert incarnation not in self._retired.get(engine_id, ()), "a retired life is no member"
        layouts = {(m.info.model, m.info.block_size, m.info.layout_hash) for m in self._members.values()}
        assert len(layouts) == len({model for model, _, _ in layouts}), "one layout a model"


def is_busy(load: EngineLoad) -> bool:
    """Whether an engine has work that must make progress.

    Waiting requests do not count: they may rightly wait for blocks or for another engine's KV.
    """
    return load.num_running > 0


def _forget_oldest(table: dict[str, _Absent] | dict[str, deque[int]]) -> None:
    if len(table) >= MAX_REMEMBERED_ENGINES:
        del table[next(iter(table))]
