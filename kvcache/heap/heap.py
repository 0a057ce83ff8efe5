"""What every symmetric heap does: one engine owns it, others put KV into it without asking.

A heap is a data region (layout.py) and a region of control words (words.py). Its owner reads and writes
both through :class:`Heap`; another process attaches and gets a :class:`PeerHeap`, through which it copies
from its own data region into the owner's and signals.

Three promises that everything above relies on:

Order    Whoever reads the value of a ``signal`` then reads the bytes of every earlier ``put`` of that
         PeerHeap. A word is stored and read whole.
Holding  A writer holds a lane before it touches it. One PeerHeap holds a lane at a time; what its holder
         wrote is visible to whoever finds the lane free; and a store by the owner before it asked
         ``is_held`` is visible to whoever holds the lane after it was found free.
Proof    ``is_held`` turns False only when no write through that hold can come any more: its holder let
         go, or is gone with all its threads and mappings. A frozen holder still holds. When a heap
         cannot know, it says True.

What a PeerHeap does may be on its way when the call returns: a GPU heap enqueues it in a stream. Promises
hold all the same; ``poll`` brings what is on its way, and ``holds`` says of a lane whether anything is.

Holding is the transport's business and not a protocol of words on purpose. With plain words (claim, then
read STATE) a writer that sleeps between reading STATE and claiming may wake when the slot serves another
grant, and overwrite the claim of a living writer, whose blocks would then look unused.

Owns the interface and what a set of copies is. Does not know grants.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable
from itertools import chain
from types import TracebackType
from typing import ClassVar, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import WordLayout
from microserve.protocol.errors import InternalError, TransferFailed
from microserve.protocol.messages.kv.grant import HeapAddress


class Copy(NamedTuple):
    """Offsets in bytes: ``source`` in the writer's data region, ``target`` in the peer's."""

    source: int
    target: int
    nbytes: int


class Copies:
    """A set of copies, neighbours merged; made once, then put for one layer after the other."""

    __slots__ = ("__weakref__", "_slices", "_spans", "copies", "nbytes", "source_end", "target_end")

    def __init__(self, copies: Iterable[Copy]) -> None:
        """:class:`InternalError` for a negative offset or size."""
        merged: list[Copy] = []
        # By source: a run of blocks merges whichever way round the block tables name it.
        for copy in sorted(copies):
            source, target, nbytes = copy
            if source < 0 or target < 0 or nbytes < 0:
                raise InternalError(f"{copy} has a negative bound")
            if merged:
                last = merged[-1]
                if last.source + last.nbytes == source and last.target + last.nbytes == target:
                    merged[-1] = Copy(last.source, last.target, last.nbytes + nbytes)
                    continue
            merged.append(copy)
        self.copies = tuple(merged)
        self.nbytes = sum(copy.nbytes for copy in merged)
        self.source_end = max((copy.source + copy.nbytes for copy in merged), default=0)
        self.target_end = max((copy.target + copy.nbytes for copy in merged), default=0)
        self._slices: tuple[tuple[slice, slice], ...] | None = None
        self._spans: array[int] | None = None

    @property
    def slices(self) -> tuple[tuple[slice, slice], ...]:
        """``(target, source)`` of each copy: heaps that are plain memory index with these."""
        if self._slices is None:
            self._slices = tuple(
                (slice(copy.target, copy.target + copy.nbytes), slice(copy.source, copy.source + copy.nbytes))
                for copy in self.copies
            )
        return self._slices

    @property
    def spans(self) -> array[int]:
        """``source, target, nbytes`` of each copy, one after the other, as int64: for native copiers."""
        if self._spans is None:
            self._spans = array("q", chain.from_iterable(self.copies))
        return self._spans


class Heap(ABC):
    """The owner's view. One thread at a time; as a context manager it closes itself."""

    layout: KvLayout
    words: WordLayout
    address: HeapAddress
    """For others to ``attach``; its incarnation is the owner's."""
    doors: tuple[HeapAddress, ...] = ()
    """Other ways into it, best first."""

    def back(self, first: int, count: int) -> int:
        """Memory for blocks from ``first`` on, for ``count`` of them or more; returns the end of those that
        have it: ``first`` if there is none now. A block must have it before anybody writes there. A heap
        that took all of its memory at once has nothing to do."""
        return self.layout.num_blocks

    @property
    def host_data(self) -> NDArray[np.uint8] | None:
        """The data region as memory of this process, which any of its threads may read and write beside this
        view; None where it is none."""
        return None

    @abstractmethod
    def read_data(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Bytes of the data region, which is zero at first, in host memory. For checksums and tests.

        Maybe a view: use it before the next call. A GPU heap waits for its whole device first.
        """

    @abstractmethod
    def write_data(self, start: int, content: NDArray[np.uint8]) -> None:
        """Set bytes of the data region, seen by every later put and kernel. For tests."""

    @abstractmethod
    def load(self, word: int) -> int:
        """The value of a word of this heap, in [0, 2**64)."""

    @abstractmethod
    def load_each(self, words: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The values of several words, each read whole; a copy."""

    @abstractmethod
    def store(self, word: int, value: int) -> None:
        """Set a word of this heap, after all earlier stores of this process."""

    @abstractmethod
    def poll(self, *, wait: bool = False) -> None:
        """Bring nearer what ``load`` and ``is_held`` see, once a step; never blocks.

        With ``wait`` it blocks (microseconds), and they see what had arrived when it was called. A heap
        whose words are host memory has nothing to do.
        """

    @abstractmethod
    def is_held(self, slot: int, lane: int) -> bool:
        """Whether a writer may still write through this lane; see Holding and Proof above.

        May make a ``hold`` of this lane fail that comes at the same moment: ask only about a closed
        grant, or a lane that is claimed already.
        """

    @abstractmethod
    def attach(self, address: HeapAddress) -> PeerHeap:
        """A writer's view of another heap.

        :class:`TransferFailed` if its owner is gone or another one, if it is out of reach from here, or
        if its KV is laid out differently.
        """

    def reach(self, address: HeapAddress, doors: Iterable[HeapAddress] = ()) -> PeerHeap:
        """Attach by the first of a heap's addresses that is in reach from here; which, its ``address`` says.

        :class:`TransferFailed` says of each why not."""
        # Words, and not the errors: their tracebacks would keep what they refer to, mappings among it.
        faults: list[str] = []
        for each in (address, *doors):
            try:
                return self.attach(each)
            except TransferFailed as fault:
                faults.append(fault.detail)
        raise TransferFailed("; ".join(faults))

    def may_be_far(self, address: HeapAddress, doors: Iterable[HeapAddress] = ()) -> bool:
        """``reach`` may wait for a network. It may then be called from another thread than everything else,
        beside it."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Leave: peers see the owner as dead. Idempotent. Close the PeerHeaps first.

        Views of its ``data`` that others hold (a torch tensor) stay valid; the memory goes with the last.
        """

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PeerHeap(ABC):
    """A writer's view of another engine's heap. One thread at a time; closes itself as a context manager.

    After ``close`` every other method raises :class:`InternalError`.
    """

    layout: KvLayout
    """The peer's own: ``num_blocks``, and so the strides, may differ from ours."""
    words: WordLayout
    address: HeapAddress
    is_late: ClassVar[bool] = True
    """Puts may go on after their calls have returned: somebody has to :meth:`poll`."""
    is_far: ClassVar[bool] = False
    """``hold``, and ``read`` of all but STATE of a lane that is held, wait for a network. One thread may then
    take lanes while another one does everything else."""

    takes_payloads: ClassVar[bool] = False
    """There is :meth:`put_payload`."""

    @property
    def is_lost(self) -> bool:
        """Nothing can be put through it any more, whatever its owner does: of a connection that is broken.
        It holds no lane; attach anew."""
        return False

    @abstractmethod
    def follow(self, stream: int) -> None:
        """Later puts read our data region after all that is enqueued in this CUDA stream by now: the one
        in which the KV is computed. Nothing to do where computing ends before its call returns."""

    @abstractmethod
    def put(self, copies: Copies, source_shift: int = 0, target_shift: int = 0) -> None:
        """Copy from our data region to the peer's, each side shifted by so many bytes.

        The source may be read until ``holds`` of the lane is False. :class:`InternalError`, and nothing
        written, if a copy leaves either region; :class:`TransferFailed` if it is lost. What else is told a
        lost heap, ``hold`` and ``read`` apart, does nothing.
        """

    def put_payload(self, payload: NDArray[np.uint8], copies: Copies, target_shift: int = 0) -> None:
        """As :meth:`put`, from ``payload`` instead of our data region. It is kept until it has been read, and
        not to be changed any more."""
        raise InternalError(f"the heap of {self.address.incarnation:#x} takes no payloads")

    @abstractmethod
    def signal(self, word: int, value: int) -> None:
        """Set a word of the peer, visible only after all earlier puts of this PeerHeap, and after its
        earlier signals of the same slot or of tags."""

    @abstractmethod
    def signal_each(self, words: NDArray[np.int64], value: int) -> None:
        """Set several words to one value; ordered like ``signal``, in no order among themselves."""

    @abstractmethod
    def read(self, word: int) -> int:
        """The value of a word of the peer, as it was at our last ``hold`` or later. Of a word that we
        signalled, maybe the value before. Of the words of a lane that we do not hold: as it was after all
        that we signalled before had taken effect."""

    @abstractmethod
    def hold(self, slot: int, lane: int) -> bool:
        """Take a lane; False, at once, if somebody (ourselves too) holds it."""

    @abstractmethod
    def let_go(self, slot: int, lane: int) -> None:
        """No put or signal of ours through this lane follows. It is free for others when all of them are
        done: at once, or by a later ``poll``. Idempotent."""

    @abstractmethod
    def holds(self, slot: int, lane: int) -> bool:
        """We hold the lane, or something that we put through it is still on its way."""

    @abstractmethod
    def poll(self, *, wait: bool = False) -> None:
        """Free the lanes that we let go and whose puts are done; once a step, never blocks.

        With ``wait`` it blocks until all that we put and signalled is there.
        """

    def leave_source(self) -> None:
        """When this returns, nothing that was put is read from our data region any more; blocks meanwhile."""
        self.poll(wait=True)

    @property
    def nbytes_per_s(self) -> float:
        """Of the network behind it, by what was measured; 0 where there is none, or none that was ever
        full."""
        return 0.0

    def take_samples(self) -> list[tuple[int, float]]:
        """Bytes, and seconds in which the network behind it was all that they waited for, of what it has
        measured since the last call; the oldest may be gone."""
        return []

    def network_s(self, nbytes: int) -> float:
        """Seconds that so many bytes take on their way, by what was measured; 0 where nothing was."""
        return nbytes / self.nbytes_per_s if self.nbytes_per_s else 0.0

    @property
    @abstractmethod
    def is_idle(self) -> bool:
        """``holds`` is False of all its lanes."""

    @abstractmethod
    def owner_is_dead(self) -> bool:
        """Proof that the owner has left or died; False when unsure."""

    @abstractmethod
    def close(self) -> None:
        """Detach, when all that we let go is done. Idempotent. :class:`InternalError` while a lane is held
        that we did not let go: a writer may be at work."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
