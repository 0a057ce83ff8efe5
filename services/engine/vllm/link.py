"""What the front and the connector inside vLLM say to each other.

    front                                            vLLM's processes (connector/)
    Receive, Generate, Send   in a request's kv_transfer_params ─────────> scheduler side
    notices                   <──────── a pipe each ────────  scheduler side, worker side
    Page                      a memfd of the front, mapped by all three

    a receive, by its word    WAIT ── arrived and verified ──> TAKE ── nobody will generate from it ──> DROP
                              WAIT ── its request is aborted, and no writer is left ──────────────────> DROP
                              WAIT ── early ──> START ── Arrived, and no writer is left ──> TAKE
                                                START ── given up, and no writer is left ─────────────> DROP
    what the front hears      Allocated ── TAKE ──> Received ── generated from, or DROP ──> Freed
                              Allocated ── START ──> Arrived, or NotArrived
                              (aborted) ── DROP, or nothing was allocated ────────────────> Freed

vLLM spawns its processes, so nothing is inherited: they open page and pipes by ``/proc/<pid>/fd/<fd>``, as
peers open heaps. None has a name, and nothing is left behind whoever is killed.

Owns the forms and the words; the ends are in link_ends.py. Knows neither vLLM nor the table of grants: both
sides import it, in vLLM's environment, without torch.
"""

from __future__ import annotations

import mmap
from collections import deque
from contextlib import suppress
from typing import Any, Final, NamedTuple, TypeAlias

import msgspec
import numpy as np

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.kv.grant import HeapAddress

KEY: Final = "microserve"
"""Of ``kv_transfer_params`` and of ``kv_connector_extra_config``: all that is ours is below it."""


# --- what a request asks of the connector ----------------------------------------------------------------


class Receive(msgspec.Struct, frozen=True, tag="receive", tag_field="op"):
    """The request is ``prompt[:end]`` with ``max_tokens=1``: vLLM allocates its blocks and parks it until its
    word says otherwise. ``id`` is of :meth:`Page.begin`."""

    id: int
    end: int


class Generate(msgspec.Struct, frozen=True, tag="generate", tag_field="op"):
    """An ordinary request that waits until that receive is in the prefix cache; at once if there is none."""

    after: int = -1
    output: int = 0
    """The last so many tokens of its prompt are output already: its grammar, if it has one, goes on behind
    them."""


class Send(msgspec.Struct, frozen=True, tag="send", tag_field="op"):
    """The request is ``prompt[:end]`` with ``max_tokens=1``: KV of ``[begin, end)`` is put into the grant's
    blocks as it is computed. ``id`` is the front's, unlike that of every send that is not over."""

    id: int
    begin: int
    end: int
    lane: int
    grant: bytes
    """A :class:`Grant` in msgpack."""
    leave_first: bool = False
    """Leave the sampled token in the lane, before it is let go."""
    output: int = 0
    """As of :class:`Generate`."""


Ask: TypeAlias = Receive | Generate | Send


def params_of(ask: Ask) -> dict[str, Any]:
    """As ``kv_transfer_params`` of a request."""
    return {KEY: {"op": type(ask).__struct_config__.tag, **msgspec.structs.asdict(ask)}}


def ask_of(params: dict[str, Any] | None) -> Ask | None:
    """What a request asks of us, if anything. :class:`InvalidRequest` if it does not decode."""
    if not params or KEY not in params:
        return None
    try:
        ask: Ask = msgspec.convert(params[KEY], Ask)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"kv_transfer_params.{KEY}: {error}", field="kv_transfer_params") from error
    return ask


# --- what the connector tells ----------------------------------------------------------------------------


class Ready(msgspec.Struct, frozen=True, tag=True):
    """Worker: vLLM's KV cache is this heap's data; ``layout`` says how much of it, and in which order."""

    heap: HeapAddress
    layout: KvLayout
    num_blocks: int


class Refused(msgspec.Struct, frozen=True, tag=True):
    """Either side, once, before it fails: what this engine is set to is not what we can do."""

    field: str
    detail: str


class Allocated(msgspec.Struct, frozen=True, tag=True):
    """Scheduler: the blocks of ``[matched, end)`` may be granted; the matched ones are pinned too."""

    id: int
    matched: int
    blocks: list[int]


class Received(msgspec.Struct, frozen=True, tag=True):
    """Scheduler: its blocks are in the prefix cache for every pass from now on, and pinned until
    :class:`Freed`."""

    id: int


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """Worker, of a receive that was started early: each layer was in and verified when its step used it."""

    id: int


class NotArrived(msgspec.Struct, frozen=True, tag=True):
    """Worker, of a receive that was started early: vLLM fails whoever the step computed from it."""

    id: int
    detail: str


class Freed(msgspec.Struct, frozen=True, tag=True):
    """Scheduler, once for each receive: its blocks are vLLM's again and its word is not read any more."""

    id: int


class Sent(msgspec.Struct, frozen=True, tag=True):
    """Worker: all of the send is there and its lane is let go."""

    id: int
    nbytes: int
    put_s: float
    """Time spent in puts, or on the network's way where that is longer."""
    heap: str = ""
    """Kind of the heap that it went through, as in ``HeapAddress.kind``."""


class SendFailed(msgspec.Struct, frozen=True, tag=True):
    """Either side: nothing more is put, and no lane is held; the request goes on until it is aborted."""

    id: int
    code: str
    """As in protocol/errors.py."""
    detail: str


Notice: TypeAlias = Ready | Refused | Allocated | Received | Arrived | NotArrived | Freed | Sent | SendFailed


# --- the page --------------------------------------------------------------------------------------------

WAIT, TAKE, DROP, START = 0, 1, 2, 3
_STATE_BITS: Final = 2
_SLOT_BITS: Final = 16
_STEPS, _LAYERS, _FREE_BLOCKS, _RUNNING, _WAITING = 0, 8, 16, 17, 18
"""Words of the page; those of different writers are in different cache lines."""
_RECEIVES: Final = 32


class Progress(NamedTuple):
    """How far vLLM is. An engine without requests does not step."""

    steps: int
    layers: int
    """Layers computed, of all steps: moves inside a long step."""
    free_blocks: int
    running: int
    waiting: int


class Page:
    """Words that front and connector share: two for each receive, and how far the engine is.

    A receive's id is ``use << 16 | slot``, and its word carries the id: what an older use left means nothing.
    Its second word says under which grant its KV comes, once it is started early.
    """

    def __init__(self, fd: int, num_receives: int) -> None:
        """``fd`` stays the caller's."""
        self._map = mmap.mmap(fd, self.nbytes(num_receives), flags=mmap.MAP_SHARED)
        self._words = np.frombuffer(self._map, np.int64)
        self._num_receives = num_receives
        self._free = deque(range(num_receives))
        self._uses = [0] * num_receives

    @staticmethod
    def nbytes(num_receives: int) -> int:
        if not 0 < num_receives <= 1 << _SLOT_BITS:
            raise InvalidRequest(f"num_receives is {num_receives}, 1 to {1 << _SLOT_BITS}")
        return 8 * (_RECEIVES + 2 * num_receives)

    # The front's:

    def begin(self) -> int | None:
        """The id of a new receive, which waits; None if every slot is in use."""
        if not self._free:
            return None
        slot = self._free.popleft()
        self._uses[slot] += 1
        receive = self._uses[slot] << _SLOT_BITS | slot
        self._words[_RECEIVES + self._num_receives + slot] = 0
        self._set(receive, WAIT)
        return receive

    def start(self, receive: int, grant_slot: int, generation: int) -> None:
        """Promote it now: the worker waits for each layer, under that grant. From here on its request ends by
        itself, and must not be aborted."""
        slot = receive & (1 << _SLOT_BITS) - 1
        self._words[_RECEIVES + self._num_receives + slot] = generation << _SLOT_BITS | grant_slot
        self._set(receive, START)

    def take(self, receive: int) -> None:
        """All has arrived and is verified: promote it."""
        self._set(receive, TAKE)

    def drop(self, receive: int) -> None:
        """No writer is left, and nobody wants it any more. Before ``take``: its request is aborted too. After
        it only behind :class:`Received`: a word that nobody has read would be lost."""
        self._set(receive, DROP)

    def retire(self, receive: int) -> None:
        """After :class:`Freed`: the slot may serve another one."""
        self._free.append(receive & (1 << _SLOT_BITS) - 1)

    def progress(self) -> Progress:
        return Progress(
            *(self._words.item(word) for word in (_STEPS, _LAYERS, _FREE_BLOCKS, _RUNNING, _WAITING))
        )

    # The connector's:

    def fate(self, receive: int) -> int:
        """``WAIT``, ``START``, ``TAKE`` or ``DROP``; ``WAIT`` of an id that is not the slot's."""
        slot = receive & (1 << _SLOT_BITS) - 1
        if receive < 0 or slot >= self._num_receives or not len(self._words):
            return WAIT
        word = self._words.item(_RECEIVES + slot)
        return word & (1 << _STATE_BITS) - 1 if word >> _STATE_BITS == receive else WAIT

    def started(self, receive: int) -> tuple[int, int] | None:
        """Slot and generation of the grant under which its KV comes, if it was ever started early. Of an id
        whose word is the slot's."""
        slot = receive & (1 << _SLOT_BITS) - 1
        word = self._words.item(_RECEIVES + self._num_receives + slot)
        return (word & (1 << _SLOT_BITS) - 1, word >> _SLOT_BITS) if word else None

    def count_layer(self) -> None:
        self._words[_LAYERS] += 1

    def count_step(self, free_blocks: int, running: int, waiting: int) -> None:
        self._words[_FREE_BLOCKS] = free_blocks
        self._words[_RUNNING] = running
        self._words[_WAITING] = waiting
        self._words[_STEPS] += 1

    def close(self) -> None:
        self._words = np.empty(0, np.int64)
        with suppress(BufferError):
            self._map.close()

    def _set(self, receive: int, state: int) -> None:
        slot = receive & (1 << _SLOT_BITS) - 1
        self._words[_RECEIVES + slot] = receive << _STATE_BITS | state
