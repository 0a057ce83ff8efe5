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

from microserve.protocol.bus.peers import Loss, Peers
from microserve.protocol.errors import EngineLost, InvalidRequest, QueueFull
from microserve.protocol.messages.engine import EngineInfo, EngineLoad
from microserve.protocol.messages.engine_info import disagreement
from microserve.protocol.messages.index import Member
from microserve.protocol.messages.numerics import fault_of_numerics
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

    def __init__(self, *, interval_s: float, silence_s: float, stuck_s: float) -> None:
        self.version = 0
        self._members: Peers[str, Member] = Peers(interval_s=interval_s, silence_s=silence_s, stuck_s=stuck_s)
        """By engine id, each with its latest load."""
        self._absent: dict[str, _Absent] = {}
        self._retired: dict[str, deque[int]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def members(self) -> list[Member]:
        """Every member with its latest load, by engine id."""
        return sorted((peer.value for peer in self._members), key=lambda member: member.info.engine_id)

    def info(self, engine_id: str) -> EngineInfo | None:
        peer = self._members.find(engine_id)
        return peer.value.info if peer else None

    def register(self, info: EngineInfo, now: float) -> Admission:
        """Let an engine in.

        Raises :class:`InvalidRequest` naming the field and both values when it does not fit the mesh,
        :class:`EngineLost` for a life that was replaced or is stuck, :class:`QueueFull` beyond
        ``MAX_MEMBERS``.
        """
        engine_id = info.engine_id
        present = self.info(engine_id)
        if present == info:  # who came later was compared with it
            self._members.heard(engine_id, now)
            return Admission.RENEWED
        self._check(info)
        if present is not None and present.incarnation == info.incarnation:
            raise InvalidRequest(
                f"{engine_id} registered as {present} and now as {info}; what an engine is "
                "does not change in its life",
                field="info",
            )
        if present is None and len(self._members) >= MAX_MEMBERS:
            raise QueueFull(f"{MAX_MEMBERS} engines are in the mesh already", retry_after_s=1.0)
        absent = self._absent.pop(engine_id, None)
        previous = present.incarnation if present else absent.incarnation if absent else None
        if previous is not None and previous != info.incarnation:
            self._retire(engine_id, previous)
        self._members.join(engine_id, engine_id, info.incarnation, Member(info, EngineLoad()), now)
        self.version += 1
        return Admission.JOINED if present is None else Admission.REPLACED

    @property
    def are_idle(self) -> bool:
        """All members, so they say."""
        return self._members.are_idle

    def vouch(self, engine_id: str, now: float) -> None:
        """For a member that cannot beat."""
        self._members.heard(engine_id, now)

    def beat(
        self, engine_id: str, incarnation: int, load: EngineLoad, now: float, next_s: float = 0.0
    ) -> bool:
        """Take a heartbeat; the next one comes in ``next_s``, if that is not 0. False: answer ``Unknown``, so
        that a living engine registers (again)."""
        peer = self._members.heard(engine_id, now, incarnation, next_s)
        if peer is not None:
            self._members.progressed(engine_id, progress=load.progress, busy=load.is_busy, now=now)
            peer.value = Member(peer.value.info, load)
            return True
        absent = self._absent.get(engine_id)
        if absent is None or absent.incarnation != incarnation or absent.stuck_at is None:
            return False
        if load.is_busy and load.progress == absent.stuck_at:
            return True
        self._absent[engine_id] = _Absent(incarnation, None)
        return False

    def deregister(self, engine_id: str, incarnation: int) -> bool:
        """A clean leave; that life does not return. False if it is no member."""
        peer = self._members.find(engine_id)
        if peer is None or peer.incarnation != incarnation:
            return False
        self._members.remove(engine_id)
        self.version += 1
        self._retire(engine_id, incarnation)
        return True

    def withdraw(self, engine_id: str) -> None:
        """It could not be taken in after all: no member, and as welcome as before."""
        self._members.remove(engine_id)
        self.version += 1

    def expire(self, now: float, next_s: float = 0.0) -> list[tuple[EngineInfo, Loss]]:
        """Remove and return the silent and the stuck. Call every interval, or in ``next_s`` if that is not
        0."""
        lost: list[tuple[EngineInfo, Loss]] = []
        for peer, loss in self._members.expire(now, next_s):
            member = peer.value
            lost.append((member.info, loss))
            self.version += 1
            stuck_at = member.load.progress if loss is Loss.STUCK else None
            _forget_oldest(self._absent)
            self._absent[peer.key] = _Absent(peer.incarnation, stuck_at)
        return lost

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
        is_asked = not info.only_publishes
        counts = ("incarnation", "block_size", "split_tokens", "num_blocks", "vocab_size")
        for field in counts if is_asked else counts[:3]:
            if getattr(info, field) < 1:
                raise InvalidRequest(f"{field} must be at least 1, is {getattr(info, field)}", field=field)
        for field in ("model", *(("address",) if is_asked else ()), "events_address"):
            if not getattr(info, field):
                raise InvalidRequest(f"{field} must not be empty", field=field)
        if fault := fault_of_numerics(info.numerics):
            raise InvalidRequest(fault, field="numerics")
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
        for peer in self._members:
            other = peer.value.info
            if other.model != info.model or other.engine_id == info.engine_id:
                continue
            if info.only_publishes or other.only_publishes:
                continue  # no KV is exchanged with it, and no request goes there
            if found := disagreement(info, other):
                raise refuse(*found, other.engine_id)

    def check_integrity(self) -> None:
        """Assert what must hold between any two events (tests call it after each)."""
        assert len(self._members) <= MAX_MEMBERS
        for peer in self._members:
            info = peer.value.info
            assert (peer.key, peer.incarnation) == (info.engine_id, info.incarnation)
            assert peer.key not in self._absent, "a member is not absent"
            assert peer.incarnation not in self._retired.get(peer.key, ()), "a retired life is no member"
        exchanging = [m.info for m in self.members() if m.info.exchanges_kv]
        layouts = {(info.model, (info.revision, info.layout_hash)) for info in exchanging}
        groups = {(model, bool(revision)) for model, (revision, _) in layouts}
        assert len(layouts) == len(groups), "one revision in one layout a model, and those that say none"


def _forget_oldest(table: dict[str, _Absent] | dict[str, deque[int]]) -> None:
    if len(table) >= MAX_REMEMBERED_ENGINES:
        del table[next(iter(table))]
