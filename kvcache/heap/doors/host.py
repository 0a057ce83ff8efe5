"""A host's heap with its doors, and the way that a writer takes to another one.

An engine's heap stays what it is, memory of its host (shm.py). Its address, and those of its doors, go out
with every grant; the sender tries them in order and takes the first that reaches:

    shm    the same kernel, and ``/proc/<pid>/fd/<fd>`` of the owner can be opened
    door   everything else: another host, another container, another user

Where an engine shares no memory (``Opening.shares_memory``) its heap is entered through doors alone, and it
goes to others through theirs. Owns that choice. Does not know settings.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Final, NamedTuple

from microserve.kvcache.heap.doors.door import SILENCE_S, Door
from microserve.kvcache.heap.doors.nixl import door as nixl
from microserve.kvcache.heap.doors.nixl.agent import Agent
from microserve.kvcache.heap.doors.nixl.peer import attach as attach_nixl
from microserve.kvcache.heap.doors.tcp import door as tcp
from microserve.kvcache.heap.doors.tcp.peer import attach as attach_tcp
from microserve.kvcache.heap.doors.tcp.post import Post
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.memfd import HeapFile, MayTake
from microserve.kvcache.heap.shm import KIND as SHM
from microserve.kvcache.heap.shm import ShmHeap, ShmView
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress

_LONG_S: Final = 1.0
_REST_S: Final = 10.0
_KINDS: Final = {tcp.KIND: tcp.TcpDoor, nixl.KIND: nixl.NixlDoor}


class Opening(NamedTuple):
    """Which doors an engine opens, and where."""

    kinds: Sequence[str] = ()
    """Best first."""
    host: str = "127.0.0.1"
    """What other hosts reach this one by."""
    port: int = 0
    """Of the first of them; 0, and for the others: any."""
    silence_s: float = SILENCE_S
    shares_memory: bool = True
    """Other engines of this host need no door, nor does this one to them."""

    def check(self) -> None:
        """Raises :class:`ConfigError` of field ``doors``."""
        for kind in self.kinds:
            if kind not in _KINDS:
                raise ConfigError(f"no door is of kind {kind!r}, of {', '.join(_KINDS)}", field="doors")
        if not self.shares_memory and not self.kinds:
            raise ConfigError("a heap that shares no memory needs a door", field="doors")

    def open(self, heap: HeapAddress, layout: KvLayout) -> list[Door]:
        """``heap``: the file that they lead to, of this host. :class:`ConfigError` of field ``doors`` or
        ``door_address`` for a door that cannot be opened; the others are closed."""
        with ExitStack() as undo:
            doors: list[Door] = []
            for kind in self.kinds:
                port = 0 if doors else self.port
                make = _KINDS[kind]
                doors.append(make(heap, layout, host=self.host, port=port, silence_s=self.silence_s))
                undo.callback(doors[-1].close)
            undo.pop_all()
        return doors

    def ways(self, heap: HeapAddress, doors: Sequence[Door]) -> list[HeapAddress]:
        """Into the heap, best first."""
        return [*([heap] if self.shares_memory else []), *(door.address for door in doors)]


class HostHeap(ShmHeap):
    """Shared memory with doors."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        num_slots: int = DEFAULT_NUM_SLOTS,
        may_take: MayTake = lambda nbytes: None,
        opening: Opening = Opening(),  # noqa: B008 - it does not change
    ) -> None:
        """:class:`ConfigError` as :class:`ShmHeap` and :class:`Opening`."""
        opening.check()
        super().__init__(layout, incarnation=incarnation, num_slots=num_slots, may_take=may_take)
        self._shares_memory = opening.shares_memory
        self._lock = threading.Lock()
        """Of what threads share that knock at doors."""
        self._post: Post | None = None
        self._agent: Agent | None = None
        self._doors: list[Door] = []
        self._silent: dict[int, float] = {}
        """Until when nobody knocks there again, by incarnation."""
        try:
            self._doors = opening.open(self.address, layout)
            if nixl.KIND in opening.kinds:
                name = f"heap-{incarnation:x}-{os.getpid()}"
                self._agent = Agent(name, self.data.ctypes.data, self.data.nbytes)
        except BaseException:
            self.close()
            raise
        self.address, *others = opening.ways(self.address, self._doors)
        self.doors = tuple(others)

    def may_be_far(self, address: HeapAddress, doors: Iterable[HeapAddress] = ()) -> bool:
        return any(each.kind in _KINDS for each in (address, *doors))

    def attach(self, address: HeapAddress) -> PeerHeap:
        """Through a door of ``nixl`` where this heap has one itself."""
        agent, source = self._agent, self._file.tail
        if address.kind == tcp.KIND:
            with self._knocking(address):
                return attach_tcp(self._its_post(), self.layout, source, address)
        if address.kind == nixl.KIND and agent is not None:
            with self._knocking(address):
                return attach_nixl(self._its_post(), agent, self.layout, source, address)
        if address.kind == SHM and not self._shares_memory:
            raise TransferFailed("this engine shares no memory: a shm heap is out of reach")
        return super().attach(address)

    @contextmanager
    def _knocking(self, address: HeapAddress) -> Iterator[None]:
        """Whoever asks at a door where nobody answers waits for seconds; those who come next do not."""
        began = time.monotonic()
        if began < self._silent.get(address.incarnation, 0.0):
            raise TransferFailed(
                f"the door of {address.incarnation:#x} is out of reach: it gave no answer lately"
            )
        try:
            yield
        except TransferFailed as fault:
            ended, cause = time.monotonic(), fault.__cause__
            is_silence = isinstance(cause, OSError) and not isinstance(cause, ConnectionError)
            if is_silence and ended - began > _LONG_S:
                with self._lock:
                    self._silent = {each: until for each, until in self._silent.items() if until > ended}
                    self._silent[address.incarnation] = ended + _REST_S
            raise

    def _its_post(self) -> Post:
        with self._lock:
            if self._post is None:
                self._post = Post()
            return self._post

    def close(self) -> None:
        if self._is_closed:
            return
        if self._post is not None:
            self._post.close()
        for door in self._doors:
            door.close()
        if self._agent is not None:
            self._agent.destroy()
        super().close()


class HostView(ShmView):
    """The owner's view from another process of the same engine, which opens the doors for it: who has the
    words is who gives grants, and says in them which ways there are."""

    def __init__(self, address: HeapAddress, layout: KvLayout, opening: Opening) -> None:
        """Errors as :class:`ShmView` and :class:`Opening`."""
        opening.check()
        super().__init__(HeapFile.open(address, SHM, layout), address)
        self._doors: list[Door] = []
        try:
            self._doors = opening.open(address, layout)
        except BaseException:
            self.close()
            raise
        self.address, *others = opening.ways(address, self._doors)
        self.doors = tuple(others)

    def close(self) -> None:
        if not self._is_closed:
            for door in self._doors:
                door.close()
        super().close()
