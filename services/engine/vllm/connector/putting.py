"""Sends on the worker's side: each layer into the receiver's blocks as soon as vLLM has computed it.

    begin_step    new sends: attach the peer, claim the lane
    put_layer     of every part of this step, from vLLM's hook behind the layer
    end_step      layers whose hook did not come; a send that is whole is finished
    ended         its request has ended: a first token is left, or what is not whole is given up

A receiver's refusal, or its death, ends that send and never the step. A lane is let go whatever happens, and
the blocks of a send stay vLLM's own until nothing that was put from them is on its way.

Owns the writers. Knows parts (sends.py), not vLLM.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field

import msgspec

from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.heap import Heap, PeerHeap
from microserve.protocol.errors import InvalidRequest, MeshError, TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.core.peers import Peers
from microserve.services.engine.core.state import Clock
from microserve.services.engine.vllm.connector.sends import Ended, Part
from microserve.services.engine.vllm.link import Send, SendFailed, Sent
from microserve.services.engine.vllm.link_ends import End


@dataclass(slots=True)
class _Sending:
    send: Send
    peer: PeerHeap | None = None
    writer: LaneWriter | None = None
    part: Part | None = None
    """Of this step."""
    layers: set[int] = field(default_factory=set)
    """Of this step's part, those that are put."""
    is_whole: bool = False
    is_told: bool = False
    nbytes: int = 0
    put_s: float = 0.0
    request_id: str = ""
    """Once its request has ended."""

    @property
    def is_lost(self) -> bool:
        """The way to its peer is gone, with all that was on it."""
        return self.peer is not None and self.peer.is_lost

    def sent(self) -> Sent:
        if self.peer is None:
            return Sent(self.send.id, self.nbytes, self.put_s)
        put_s = max(self.put_s, self.peer.network_s(self.nbytes))
        return Sent(self.send.id, self.nbytes, put_s, self.peer.address.kind)

    @property
    def is_drained(self) -> bool:
        return self.writer is None or self.is_lost or self.writer.is_drained


class Putting:
    def __init__(self, heap: Heap, link: End, clock: Clock) -> None:
        self._heap = heap
        self._link = link
        self._clock = clock
        self._peers = Peers(heap, clock)
        self._sendings: dict[int, _Sending] = {}
        self._active: list[_Sending] = []

    def begin_step(self, parts: list[Part]) -> None:
        self._active = []
        for part in parts:
            sending = self._sendings.get(part.send.id)
            if sending is None:
                sending = self._sendings[part.send.id] = self._begin(part.send)
            if not sending.is_told:
                sending.part = part
                sending.layers.clear()
                self._active.append(sending)

    def put_layer(self, layer: int) -> None:
        for sending in self._active:
            if layer not in sending.layers:
                self._put(sending, layer)

    def end_step(self) -> None:
        """Nothing that this step computed is put later."""
        for sending in self._active:
            for layer in range(self._heap.layout.num_layers):
                if layer not in sending.layers:
                    self._put(sending, layer)
            part, sending.part = sending.part, None
            if part is not None and part.hi == sending.send.end and not sending.is_told:
                sending.is_whole = True
                if sending.writer is not None and not sending.send.leave_first:
                    _let_go(sending.writer)
        self._active = []
        self._peers.poll()
        for sending in self._sendings.values():
            self._tell_if_sent(sending)

    def end(self, ended: list[Ended]) -> None:
        for each in ended:
            sending = self._sendings.get(each.id)
            if sending is None:  # its request was computed, and no step with a part of it was run
                sending = self._sendings[each.id] = _Sending(Send(each.id, 0, 0, 0, b""), is_told=True)
                self._link.tell(SendFailed(each.id, TransferFailed.code, "ended before any of it was put"))
            sending.request_id = each.request_id
            writer = sending.writer
            if sending.is_told or writer is None:
                continue
            if not sending.is_whole or (sending.send.leave_first and each.first_token is None):
                self._fail(sending, TransferFailed("ended before all of it was computed"))
                continue
            if sending.send.leave_first and each.first_token is not None:
                try:
                    writer.set_first_token(each.first_token)
                except MeshError as error:
                    self._fail(sending, error)
                _let_go(writer)
            self._tell_if_sent(sending)

    def drained(self) -> set[str]:
        """Ended requests whose blocks may be overwritten, each once."""
        over = [sending for sending in self._sendings.values() if sending.request_id and sending.is_drained]
        for sending in over:
            self._tell_if_sent(sending)
            del self._sendings[sending.send.id]
        return {sending.request_id for sending in over}

    def wait(self) -> None:
        """Until nothing that was put is read from our blocks any more: they are about to be overwritten."""
        for sending in self._sendings.values():
            if sending.peer is not None and sending.peer.is_late and not sending.is_drained:
                with suppress(MeshError, OSError):  # lost while we wait: nothing of it is on its way
                    sending.peer.leave_source()

    def close(self) -> None:
        for sending in self._sendings.values():
            if sending.writer is not None:
                _give_up(sending.writer)
        self._sendings.clear()
        self._peers.close()

    def _begin(self, send: Send) -> _Sending:
        sending = _Sending(send)
        try:
            grant = _grant_of(send)
            peer = self._peers.open(grant)
            if peer.holds(grant.slot, send.lane):
                # Ours: a claim under the slot's last grant came too late, and leaves behind other puts.
                peer.poll(wait=True)
            writer = LaneWriter(
                *(self._heap, peer, grant, send.lane, send.begin, send.end),
                checksums=self._link.address.checksums,
            )
            writer.claim()
            sending.peer, sending.writer = peer, writer
        except (MeshError, OSError, MemoryError) as error:
            self._fail(sending, error)
        return sending

    def _put(self, sending: _Sending, layer: int) -> None:
        part, writer = sending.part, sending.writer
        sending.layers.add(layer)
        if part is None or writer is None or sending.is_told:
            return
        since = self._clock()
        try:
            sending.nbytes += writer.put_layer(layer, part.blocks, part.lo, part.hi)
        except (MeshError, OSError, MemoryError) as error:
            self._fail(sending, error)
        sending.put_s += self._clock() - since

    def _fail(self, sending: _Sending, error: Exception) -> None:
        sending.is_told = True
        if sending.writer is not None:
            _give_up(sending.writer)
        code = error.code if isinstance(error, MeshError) else TransferFailed.code
        self._link.tell(SendFailed(sending.send.id, code, str(error) or type(error).__name__))

    def _tell_if_sent(self, sending: _Sending) -> None:
        if not sending.is_whole or sending.is_told:
            return
        if sending.is_lost:
            self._fail(sending, TransferFailed("the way to the receiver was lost before all of it was there"))
        elif sending.writer is not None and sending.writer.is_drained:
            sending.is_told = True
            self._link.tell(sending.sent())


def _let_go(writer: LaneWriter) -> None:
    with suppress(MeshError, OSError):
        writer.finish()


def _give_up(writer: LaneWriter) -> None:
    """A peer that cannot be told (its door is lost) sees the lane let go all the same."""
    with suppress(MeshError, OSError):
        writer.fail()


def _grant_of(send: Send) -> Grant:
    try:
        return msgspec.msgpack.decode(send.grant, type=Grant)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"the grant does not decode: {error}", field="grant") from error
