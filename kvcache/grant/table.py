"""Grants from the receiver's side: who may write into which blocks, what has arrived, when blocks are free.

                 consume           seal (all is in)           poll: nobody holds a lane
    open ──────────> open, no lease ──────> sealed ───────────────────> Settled: blocks are the caller's
      │ lease over         │ close            │ close
      └────────────────────┴──────────────────┴──> nobody holds a lane: blocks are free
                                                   else quarantine ──poll──> Discharged: blocks are free

Closing stores CLOSED first and asks afterwards who holds a lane: whoever takes a lane later reads CLOSED
and writes nothing (heap.py, Holding). So blocks leave the table only when no write into them can come:
on the writers' word (they let their lanes go) or on proof of their death, never on a timer alone.

Until a grant has settled the table owns its blocks, and nobody may share them or put them into the prefix
cache: a writer that still holds a lane could write into them, and a quarantined block must have no other
user.

Owns grants, their slots in the heap and their blocks. Does not know requests, sockets or the transfers'
content (arrival.py reads that); takes the time as an argument.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from microserve.kvcache.grant.arrival import Arrival
from microserve.kvcache.grant.counts import GrantCounts
from microserve.kvcache.grant.decoding import Decoder
from microserve.kvcache.grant.entry import Entry, State
from microserve.kvcache.grant.pool import GrantPool
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.words import CLOSED, MAX_GENERATION, OPEN, pack_state
from microserve.protocol.errors import GrantsFull, InternalError, TransferFailed, UnknownRequest
from microserve.protocol.messages.adapter import Adapter
from microserve.protocol.messages.kv.grant import MAX_LANES, Grant

RETRY_AFTER_S = 0.1
"""Hint when every slot is in use: about the time in which some transfer ends."""


@dataclass(frozen=True, slots=True)
class Expired:
    """Nobody consumed the grant in time; it is closed, its blocks are free or in quarantine."""

    grant_id: str
    request_id: str
    owner: str


@dataclass(frozen=True, slots=True)
class Settled:
    """No writer is left. The blocks, matched ones included, belong to the request now: they may be
    shared and cached, and the caller frees them. The table has forgotten the grant."""

    grant_id: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Discharged:
    """A closed grant's last writer let go or is proven dead: its blocks are free again."""

    grant_id: str
    request_id: str
    num_blocks: int


GrantEvent = Expired | Settled | Discharged


class GrantTable:
    """All grants that one engine has given out."""

    def __init__(
        self,
        heap: Heap,
        pool: GrantPool,
        *,
        engine_id: str,
        incarnation: int,
        lease_s: float,
        verify_checksums: bool,
        numerics: str = "",
        decoder: Decoder | None = None,
    ) -> None:
        """``pool`` hands out the blocks of ``heap``; nobody else puts any of them into quarantine.
        ``numerics``: name of the class in which the engine computes. ``decoder``: what makes rows of a
        codec's payloads; None: nothing does."""
        self._heap = heap
        self._pool = pool
        self._engine_id = engine_id
        self._incarnation = incarnation
        self._lease_s = lease_s
        self._verify_checksums = verify_checksums
        self._numerics = numerics
        self._decoder = decoder
        self._entries: dict[str, Entry] = {}
        # Used in turn, so that a slot rests as long as possible before its next generation.
        self._free_slots = deque(range(heap.words.num_slots))
        self._generations = [0] * heap.words.num_slots
        self.num_refuted = 0
        """Complete layers whose tags or checksums were not their writers' (:meth:`verify`)."""

    @property
    def layout(self) -> KvLayout:
        """Of the heap that grants are of."""
        return self._heap.layout

    @property
    def num_slots(self) -> int:
        """Grants that can be open, sealed or in quarantine at a time."""
        return self._heap.words.num_slots

    # --- life of a grant -----------------------------------------------------------------------------

    def open(
        self,
        request_id: str,
        owner: str,
        matched_blocks: list[int],
        matched: int,
        blocks: list[int],
        end: int,
        now: float,
        adapter: Adapter | None = None,
        *,
        may_lose: bool = False,
    ) -> Grant:
        """Permit writers to put KV of tokens ``[matched, end)`` into ``blocks``.

        The caller has allocated ``blocks`` and holds one more reference to each of ``matched_blocks``, the
        prefix that it has already; all of that becomes the table's. :class:`GrantsFull` when every slot is in
        use; the blocks are then still the caller's. ``adapter``: whose KV it is to be. ``may_lose``: it may
        come by a codec that loses some of it.
        """
        layout = self._heap.layout
        if (
            not 0 <= matched <= end
            or matched % layout.block_size
            or len(matched_blocks) * layout.block_size != matched
            or len(blocks) != layout.num_grant_blocks(matched, end)
        ):
            raise InternalError(
                f"open: [{matched}, {end}) with {len(matched_blocks)} matched and {len(blocks)} new blocks"
            )
        slot = self._take_slot()
        generation = self._generations[slot] = self._generations[slot] + 1
        grant = Grant(
            grant_id=self.grant_id(slot, generation),
            engine_id=self._engine_id,
            incarnation=self._incarnation,
            slot=slot,
            generation=generation,
            matched=matched,
            end=end,
            blocks=list(blocks),
            block_size=layout.block_size,
            layout_hash=layout.layout_hash,
            heap=self._heap.address,
            lease_s=self._lease_s,
            numerics=self._numerics,
            geometry=layout.geometry,
            doors=list(self._heap.doors),
            adapter=adapter,
            decoding=self._decoder.terms if self._decoder is not None else None,
        )
        arrival = Arrival(self._heap, grant, verify_checksums=self._verify_checksums, may_lose=may_lose)
        self._entries[grant.grant_id] = Entry(grant, arrival, request_id, owner, list(matched_blocks), now)
        self._heap.store(self._heap.words.state(slot), pack_state(generation, OPEN))
        return grant

    def consume(self, grant_id: str) -> None:
        """A ``StartGenerate`` or ``Commit`` has taken the grant over: its lease stops. Idempotent."""
        self._live(grant_id).is_consumed = True

    def seal(self, grant_id: str) -> None:
        """All that is wanted of the writers is here: no new writer may start. Idempotent.

        Comes after ``is_complete``, and after ``first_token`` where one is awaited. The request may read
        and extend the blocks; see the module about sharing them. :class:`InternalError` before then.
        """
        entry = self._live(grant_id)
        if entry.state is State.SEALED:
            return
        if not self.is_complete(grant_id):
            raise InternalError(f"seal: grant {grant_id} is not complete")
        self._store_closed(entry)
        entry.state = State.SEALED
        entry.is_consumed = True

    def is_settled(self, grant_id: str) -> bool:
        """Sealed, and no writer is left: the next ``poll`` says :class:`Settled`."""
        entry = self._live(grant_id)
        return entry.state is State.SEALED and self._let_go_drained(entry)

    def close(self, grant_id: str, now: float) -> None:
        """Nobody wants the blocks any more, open or sealed: they are freed, or quarantined while a writer
        holds a lane. Not for a grant that has settled: its blocks are the caller's to free."""
        entry = self._live(grant_id)
        self._store_closed(entry)
        # No writer was ever told these.
        self._pool.free(entry.matched_blocks)
        if self._let_go_drained(entry):
            self._pool.free(entry.grant.blocks)
            self._forget(entry)
        else:
            self._pool.quarantine(entry.grant.blocks)
            entry.state = State.QUARANTINED
            entry.since = now

    def poll(self, now: float) -> list[GrantEvent]:
        """What time and the writers have brought. To be called every step, and a few times a second when
        idle: a lane that is let go wakes nobody."""
        self._heap.poll()
        events: list[GrantEvent] = []
        for entry in list(self._entries.values()):
            grant_id, request_id = entry.grant.grant_id, entry.request_id
            if entry.state is State.OPEN:
                if self._decoder is not None:
                    for lane in entry.arrival.new_decoders():
                        self._decoder.add(lane)
                if not entry.is_consumed and now >= entry.since + self._lease_s:
                    self.close(grant_id, now)
                    events.append(Expired(grant_id, request_id, entry.owner))
            elif self._let_go_drained(entry):
                self._forget(entry)
                if entry.state is State.SEALED:
                    events.append(Settled(grant_id, request_id))
                else:
                    # From the end, so that the free list hands them out as the run that they were.
                    self._pool.discharge(reversed(entry.grant.blocks))
                    events.append(Discharged(grant_id, request_id, len(entry.grant.blocks)))
        return events

    # --- what has arrived (arrival.py) ---------------------------------------------------------------

    def frontier(self, grant_id: str, layer: int) -> int:
        """KV of tokens ``[matched, frontier)`` is here in this layer, from all lanes together."""
        return self._live(grant_id).arrival.frontier(layer)

    def layer_complete(self, grant_id: str, layer: int) -> bool:
        """KV of tokens ``[matched, end)`` is here in this layer."""
        return self._live(grant_id).arrival.layer_complete(layer)

    def is_complete(self, grant_id: str) -> bool:
        """All layers are here. Cheap while they are not."""
        return self._live(grant_id).arrival.is_complete()

    def poisoned(self, grant_id: str, *, await_first: bool = False) -> str | None:
        """Why the grant will never complete: a writer gave up, or is gone before its part was whole.

        Says nothing about lanes that nobody claimed, and means nothing once the grant is complete.
        """
        return self._live(grant_id).arrival.poisoned(await_first=await_first)

    def is_lossy(self, grant_id: str) -> bool:
        """Some of what is here has come by a codec that loses."""
        return self._live(grant_id).arrival.is_lossy

    def first_token(self, grant_id: str) -> int | None:
        """The first output token, if a writer has sampled and left it."""
        return self._live(grant_id).arrival.first_token()

    def verify(self, grant_id: str, layer: int) -> None:
        """Check a complete layer before its first use; :class:`TransferFailed` names layer and block."""
        try:
            self._live(grant_id).arrival.verify(layer)
        except TransferFailed:
            self.num_refuted += 1
            raise

    # --- the table -----------------------------------------------------------------------------------

    def grant(self, grant_id: str) -> Grant:
        """An open or sealed grant; :class:`UnknownRequest` otherwise, here and everywhere above."""
        return self._live(grant_id).grant

    def block_table(self, grant_id: str) -> list[int]:
        """Blocks of tokens ``[0, end)``, in order: the matched ones, then the received ones."""
        entry, num_state = self._live(grant_id), len(self.state_table(grant_id))
        return entry.matched_blocks + entry.grant.blocks[: len(entry.grant.blocks) - num_state]

    def state_table(self, grant_id: str) -> list[int]:
        """Of a hybrid model: blocks of its state at ``end``; empty where nothing is to come."""
        grant = self._live(grant_id).grant
        return grant.blocks[self._heap.layout.num_blocks_for(grant.end - grant.matched) :]

    def grant_id(self, slot: int, generation: int) -> str:
        """The id of that use of the slot, whatever has become of it."""
        return f"{self._engine_id}/{self._incarnation:x}/{slot}/{generation}"

    def stage(self, slot: int, generation: int) -> str:
        """What has become of that use of the slot: ``open``, ``sealed``, ``quarantined``, or empty when the
        table has done with it. For whoever looks at writers from outside."""
        entry = self._entries.get(self.grant_id(slot, generation))
        return entry.state.value if entry is not None else ""

    def request_of(self, grant_id: str) -> str:
        """Id of the request that an open or sealed grant was asked for."""
        return self._live(grant_id).request_id

    @property
    def has_any(self) -> bool:
        """A grant is open, sealed or in quarantine: ``poll`` may find something."""
        return bool(self._entries)

    @property
    def live_ids(self) -> list[str]:
        """Of open and sealed grants."""
        return [grant_id for grant_id, _ in self._live_entries()]

    def owned_by(self, owner: str) -> list[str]:
        """Ids of open and sealed grants of one owner (a router that has gone, say)."""
        return [grant_id for grant_id, entry in self._live_entries() if entry.owner == owner]

    def counts(self, now: float) -> GrantCounts:
        """For stats."""
        entries = list(self._entries.values())
        quarantined = [entry for entry in entries if entry.state is State.QUARANTINED]
        is_open = [entry for entry in entries if entry.state is State.OPEN]
        return GrantCounts(
            num_open=len(is_open),
            num_sealed=len(entries) - len(is_open) - len(quarantined),
            num_quarantined=len(quarantined),
            num_quarantined_blocks=sum(len(entry.grant.blocks) for entry in quarantined),
            num_free_slots=len(self._free_slots),
            oldest_quarantine_s=max((now - entry.since for entry in quarantined), default=0.0),
            num_live_blocks=sum(len(entry.grant.blocks) for _, entry in self._live_entries()),
            oldest_open_s=max((now - entry.since for entry in is_open), default=0.0),
        )

    def check_integrity(self) -> None:
        """O(slots + blocks of grants). Raises :class:`InternalError` that says what is broken."""
        in_use: dict[int, str] = {}
        slots: dict[int, Entry] = {}
        for grant_id, entry in self._entries.items():
            grant, is_quarantined = entry.grant, entry.state is State.QUARANTINED
            if slots.setdefault(grant.slot, entry) is not entry or grant.slot in self._free_slots:
                raise InternalError(f"slot {grant.slot} is used twice")
            word = self._heap.load(self._heap.words.state(grant.slot))
            if word != pack_state(grant.generation, OPEN if entry.state is State.OPEN else CLOSED):
                raise InternalError(f"grant {grant_id} is {entry.state.value}, its STATE is {word:#x}")
            for block in grant.blocks:
                if in_use.setdefault(block, grant_id) != grant_id:
                    raise InternalError(f"block {block} is in grants {in_use[block]} and {grant_id}")
                if self._pool.ref_count(block) != (0 if is_quarantined else 1) or self._pool.is_cached(block):
                    raise InternalError(
                        f"block {block} of {entry.state.value} grant {grant_id} has "
                        f"{self._pool.ref_count(block)} references, cached={self._pool.is_cached(block)}"
                    )
        for slot, generation in enumerate(self._generations):
            word = self._heap.load(self._heap.words.state(slot))
            if slot not in slots and word != (pack_state(generation, CLOSED) if generation else 0):
                raise InternalError(f"slot {slot} is free, its STATE is {word:#x}")
        if (num := self.counts(0.0).num_quarantined_blocks) != self._pool.num_quarantined:
            raise InternalError(f"{num} blocks in quarantine here, {self._pool.num_quarantined} in the pool")

    # --- inside --------------------------------------------------------------------------------------

    def _live(self, grant_id: str) -> Entry:
        entry = self._entries.get(grant_id)
        if entry is None or entry.state is State.QUARANTINED:
            raise UnknownRequest(f"no grant {grant_id!r} is open here", field="grant_id")
        return entry

    def _live_entries(self) -> list[tuple[str, Entry]]:
        return [item for item in self._entries.items() if item[1].state is not State.QUARANTINED]

    def _take_slot(self) -> int:
        """A free slot with no lane held: a late writer may hold one until it reads that its grant is closed,
        or be frozen there, and the next grant's own writer would find its lane taken."""
        for slot in self._free_slots:
            if not any(self._heap.is_held(slot, lane) for lane in range(MAX_LANES)):
                self._free_slots.remove(slot)
                return slot
        raise GrantsFull(f"all {self._heap.words.num_slots} grants are in use", retry_after_s=RETRY_AFTER_S)

    def _store_closed(self, entry: Entry) -> None:
        slot = entry.grant.slot
        self._heap.store(self._heap.words.state(slot), pack_state(entry.grant.generation, CLOSED))
        entry.arrival.stop_decoding()

    def _let_go_drained(self, entry: Entry) -> bool:
        """Look which lanes of a closed grant are held still; True: no write under it can come any more, a
        decoder's neither."""
        for lane in list(entry.held_lanes):
            if not self._heap.is_held(entry.grant.slot, lane):
                entry.held_lanes.remove(lane)
        return not entry.held_lanes and not entry.arrival.is_decoding

    def _forget(self, entry: Entry) -> None:
        del self._entries[entry.grant.grant_id]
        if entry.grant.generation < MAX_GENERATION:
            self._free_slots.append(entry.grant.slot)
