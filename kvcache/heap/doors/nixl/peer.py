"""A writer's view of a heap through its door of NIXL: KV by the agent of our heap, everything else as over
TCP, payloads of a codec too: they lie in no memory that the agent knows.

A signal waits in the line until every put before it is there; the post looks.
"""

from __future__ import annotations

from microserve.kvcache.heap.doors.nixl.agent import Agent
from microserve.kvcache.heap.doors.tcp.peer import TcpPeerHeap, connect
from microserve.kvcache.heap.doors.tcp.post import Post
from microserve.kvcache.heap.heap import Copies
from microserve.kvcache.heap.mapped import require_inside
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress


def attach(
    post: Post, agent: Agent, mine: KvLayout, source: memoryview, address: HeapAddress
) -> NixlPeerHeap:
    """``agent``: of our heap. :class:`TransferFailed` as of a door of TCP, or if NIXL does not get there."""
    connection, line, terms = connect(mine, address)
    try:
        with post.calling:
            name = agent.connect(terms.agent)
    except TransferFailed:
        connection.close()
        raise
    peer = NixlPeerHeap(post, line, terms, address, source)
    peer.agent, peer.name, peer.base = agent, name, terms.base
    post.add(line, connection)
    return peer


class NixlPeerHeap(TcpPeerHeap):
    agent: Agent
    name: str
    base: int

    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        self._require_open()
        require_inside(copies, source_shift, target_shift, len(self._source), self.layout.data_nbytes)
        self._require_line()
        shifted = [
            (source + source_shift, target + target_shift, nbytes)
            for source, target, nbytes in copies.copies
            if nbytes
        ]
        if not shifted:
            return
        with self._post.using(self._line):
            if self._line.end is None:
                self._line.fly(self.agent.put(shifted, self.name, self.base))

    def leave_source(self) -> None:
        self.poll(wait=True)

    def close(self) -> None:
        if not self._is_closed:
            super().close()
            with self._post.calling:
                self.agent.forget(self.name)
