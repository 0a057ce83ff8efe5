"""The owner's end of a door of NIXL: a connection to each writer, and an agent for each.

The fence. NIXL lets a writer put into any address of an agent's region until the agent is gone: where UCX
emulates such puts (over TCP), the agent's own thread carries out whatever still comes, by raw address, and
taking the region or the writer's name out of the agent changes nothing. So every writer has an agent of its
own here, and a writer that is torn down loses it whole: destroying it ends that thread and closes every
socket and queue pair of the writer, and nothing that was sent to it, or is sent later, finds anybody. Its
lanes are free when that has returned; where it does not return they stay held, and the blocks in
quarantine, for as long as this process lives. No agent uses memory that a writer of this host could reach
by itself (agent.py).

Order. A writer sends a signal over the connection after NIXL has told it that every earlier put is there.
Tested over UCX's TCP. On RDMA hardware the same holds by the verbs' rules (a destroyed queue pair takes no
more packets); nobody has run it there.

Making an agent takes half a second and destroying one a quarter; threads do it, and the others are served
meanwhile.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from typing import Final

import msgspec
import numpy as np
import structlog

from microserve.kvcache.heap.doors.nixl.agent import Agent
from microserve.kvcache.heap.doors.tcp.door import Caller, TcpDoor
from microserve.protocol import log
from microserve.protocol.errors import ConfigError

KIND: Final = "nixl"
MAX_WRITERS: Final = 64
"""An agent has 16 descriptors and a thread, and more of both as it is used."""

_logger = structlog.get_logger()


class NixlDoor(TcpDoor):
    """As :class:`TcpDoor`; :class:`ConfigError` of field ``doors`` without NIXL."""

    kind = KIND
    max_writers = MAX_WRITERS

    def admit(self, caller: Caller) -> None:
        self._in_a_thread(self._make, caller)

    def dismiss(self, caller: Caller) -> None:
        agent = self._agents.pop(caller, None)
        if agent is None:
            self.free_lanes(caller)
        else:
            self._in_a_thread(self._destroy, caller, agent)

    def on_wake(self) -> None:
        while self._made:
            caller, agent = self._made.popleft()
            if caller not in self._callers:
                self._in_a_thread(self._destroy, caller, agent)
                continue
            self._agents[caller] = agent
            terms = msgspec.structs.replace(self._terms, agent=agent.metadata, base=agent.address)
            self.let_in(caller, terms)
        while self._unmade:
            self._tear_down(self._unmade.popleft())
        while self._destroyed:
            self.free_lanes(self._destroyed.popleft())

    def on_end(self) -> None:
        while self._threads:
            self._threads.pop().join()
            self.on_wake()

    def prepare(self) -> None:
        """Before the thread starts. Shows that there is a NIXL, too."""
        data = np.frombuffer(self._lanes.data, np.uint8)
        self._region = data.ctypes.data, data.size
        self._num_agents = 0
        self._agents: dict[Caller, Agent] = {}
        self._made: deque[tuple[Caller, Agent]] = deque()
        self._unmade: deque[Caller] = deque()
        self._destroyed: deque[Caller] = deque()
        self._threads: list[threading.Thread] = []
        self._new_agent().destroy()

    def _new_agent(self) -> Agent:
        self._num_agents += 1
        return Agent(f"door-{self.address.incarnation:x}-{self.address.fd}-{self._num_agents}", *self._region)

    def _in_a_thread(self, do, *what) -> None:  # type: ignore[no-untyped-def]
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        thread = threading.Thread(target=do, args=what, name="door-nixl-agent", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _make(self, caller: Caller) -> None:
        try:
            self._made.append((caller, self._new_agent()))
        except ConfigError as error:
            _logger.warning(log.DOOR_REFUSED, kind=KIND, peer=caller.peer, detail=error.detail)
            self._unmade.append(caller)
        os.eventfd_write(self._wake, 1)

    def _destroy(self, caller: Caller, agent: Agent) -> None:
        agent.destroy()
        self._destroyed.append(caller)
        os.eventfd_write(self._wake, 1)
