"""A host's heap with its doors, and the way that a writer takes to another one.

An engine's heap stays what it is, memory of its host (shm.py). Its address, and those of its doors, go out
with every grant; the sender tries them in order and takes the first that reaches:

    shm    the same kernel, and ``/proc/<pid>/fd/<fd>`` of the owner can be opened
    door   everything else: another host, another container, another user

Where an engine shares no memory (``shares_memory=False``) its heap is entered through doors alone, and it
goes to others through theirs. Owns that choice. Does not know settings.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Final

from microserve.kvcache.heap.doors.door import Door
from microserve.kvcache.heap.doors.nixl import door as nixl
from microserve.kvcache.heap.doors.nixl.agent import Agent
from microserve.kvcache.heap.doors.nixl.peer import attach as attach_nixl
from microserve.kvcache.heap.doors.tcp import door as tcp
from microserve.kvcache.heap.doors.tcp.peer import attach as attach_tcp
from microserve.kvcache.heap.doors.tcp.post import Post
from microserve.kvcache.heap.heap import PeerHeap
from microserve.kvcache.heap.memfd import MayTake
from microserve.kvcache.heap.shm import KIND as SHM
from microserve.kvcache.heap.shm import ShmHeap
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import DEFAULT_NUM_SLOTS
from microserve.protocol.errors import ConfigError, TransferFailed
from microserve.protocol.messages.grant import HeapAddress

_KINDS: Final = {tcp.KIND: tcp.TcpDoor, nixl.KIND: nixl.NixlDoor}


class HostHeap(ShmHeap):
    """Shared memory with doors."""

    def __init__(
        self,
        layout: KvLayout,
        *,
        incarnation: int,
        num_slots: int = DEFAULT_NUM_SLOTS,
        may_take: MayTake = lambda nbytes: None,
        doors: Sequence[str] = (),
        host: str = "127.0.0.1",
        port: int = 0,
        silence_s: float = 10.0,
        shares_memory: bool = True,
    ) -> None:
        """``doors``: kinds, best first; ``host``: what other hosts reach this one by; ``port``: of ``tcp``,
        0: any. Without ``shares_memory`` there must be a door.

        :class:`ConfigError` as :class:`ShmHeap`; of field ``doors`` or ``door_address`` for a door that
        cannot be opened."""
        for kind in doors:
            if kind not in _KINDS:
                raise ConfigError(f"no door is of kind {kind!r}, of {', '.join(_KINDS)}", field="doors")
        if not shares_memory and not doors:
            raise ConfigError("a heap that shares no memory needs a door", field="doors")
        super().__init__(layout, incarnation=incarnation, num_slots=num_slots, may_take=may_take)
        self._shares_memory = shares_memory
        self._post: Post | None = None
        self._agent: Agent | None = None
        with ExitStack() as undo:
            undo.callback(super().close)
            self._doors: list[Door] = []
            for kind in doors:
                its_port = port if kind == doors[0] else 0
                door = _KINDS[kind](self.address, layout, host=host, port=its_port, silence_s=silence_s)
                self._doors.append(door)
                undo.callback(door.close)
            if nixl.KIND in doors:
                name = f"heap-{incarnation:x}-{os.getpid()}"
                self._agent = Agent(name, self.data.ctypes.data, self.data.nbytes)
            undo.pop_all()
        ways = [door.address for door in self._doors]
        if shares_memory:
            ways.insert(0, self.address)
        self.address, self.doors = ways[0], tuple(ways[1:])

    def attach(self, address: HeapAddress) -> PeerHeap:
        if address.kind == tcp.KIND:
            if self._post is None:
                self._post = Post()
            return attach_tcp(self._post, self.layout, self._file.tail, address)
        if address.kind == nixl.KIND and self._agent is not None:
            if self._post is None:
                self._post = Post()
            return attach_nixl(self._post, self._agent, self.layout, self._file.tail, address)
        if address.kind == SHM and not self._shares_memory:
            raise TransferFailed("this engine shares no memory: a shm heap is out of reach")
        return super().attach(address)

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
