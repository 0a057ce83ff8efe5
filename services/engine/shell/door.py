"""What the shell asks of a core: of ours (core/core.py), or of one that puts another engine behind it.

A core decides and computes; it has no socket. Every call here is quick, and made with the core's lock held
unless it says otherwise. What cannot be answered at once comes through the outbox, and whoever runs the core
says so (``on_output``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Sized
from contextlib import AbstractContextManager
from typing import Protocol

from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.kv_events import BlockStored, KVEvent
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.metrics.readings import Readings
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.request.record import Outbox
from microserve.services.engine.core.state import Clock
from microserve.services.engine.kind import EngineKind


class Steps(Protocol):
    """What runs a core until it is stopped."""

    def start(self) -> None: ...
    def stop(self, timeout_s: float) -> bool:
        """Ask it to end and wait; False if something still runs after ``timeout_s``. Without the lock."""
        ...


MakeSteps = Callable[[Callable[[], None], Callable[[], None]], Steps]
"""From ``on_output`` and ``on_crash``, which may be called from another thread, without the lock."""


class CoreActions(Protocol):
    """The verbs of WIRE.md 4.1, of peer ``owner``. An answer, or None and it follows through the outbox, or a
    :class:`MeshError`; ``token_ids``: those that came with the message."""

    def prep_recv(
        self, owner: bytes, message: wire.PrepRecv, token_ids: list[int] | None, now: float
    ) -> wire.Granted | None: ...
    def remote_send(
        self, owner: bytes, message: wire.RemoteSend, token_ids: list[int] | None, now: float
    ) -> wire.Sent | None: ...
    def start_generate(
        self, owner: bytes, message: wire.StartGenerate, token_ids: list[int] | None, now: float
    ) -> wire.Accepted | None: ...
    def commit(self, owner: bytes, message: wire.Commit, now: float) -> None: ...
    def release(self, owner: bytes, message: wire.Release, now: float) -> wire.Done: ...
    def abort(self, owner: bytes, message: wire.Abort, now: float) -> wire.Done: ...


class CoreState(Protocol):
    """What a core holds for its routers."""

    draining: bool
    """Set by the shell: no new work; contexts may still be sent away."""

    @property
    def limits(self) -> Limits: ...
    @property
    def outbox(self) -> Outbox: ...
    @property
    def records(self) -> Sized: ...
    @property
    def counters(self) -> Mapping[str, int]: ...
    @property
    def num_requests(self) -> int: ...
    @property
    def may_expire_soon(self) -> bool:
        """There is a request or a grant: time alone may end it."""
        ...

    def is_drained(self, now: float) -> bool:
        """Nothing is left here for whose sake a draining engine must stay."""
        ...

    def drop_owner(self, owner: bytes, now: float) -> int:
        """The router is lost: end all of its requests. The number that were open."""
        ...


class Core(Protocol):
    """An engine without sockets."""

    engine_id: str
    incarnation: int
    model: str
    numerics: Numerics
    kernels: str
    """What computes, in a word for people."""
    kind: EngineKind
    """What it can, for its hello."""
    layout: KvLayout
    clock: Clock
    """What every ``now`` that is handed to ``actions`` and ``state`` is read from."""

    @property
    def progress(self) -> int:
        """Grows while something is computed or sent; a busy core's must."""
        ...

    @property
    def actions(self) -> CoreActions: ...
    @property
    def state(self) -> CoreState: ...
    @property
    def lock(self) -> AbstractContextManager[bool]: ...
    @property
    def is_busy(self) -> bool: ...
    @property
    def has_output(self) -> bool: ...

    def wake(self) -> None:
        """There may be something to run."""
        ...

    def take_output(self) -> tuple[Outbox, list[KVEvent]]:
        """Answers, deltas and KV events since the last call, in order."""
        ...

    def cached_blocks(self) -> Sequence[BlockStored]:
        """Events that build the prefix cache as it is now from nothing; take the output first."""
        ...

    def load(self) -> wire.EngineLoad: ...

    def read(self, readings: Readings) -> None:
        """What it holds and has done, beside what :meth:`load` says."""
        ...

    def close(self) -> None:
        """End what is left. After its steps have ended, without the lock."""
        ...
