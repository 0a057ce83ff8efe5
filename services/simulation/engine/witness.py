"""Who writes into whose memory, seen from outside: what must be true of every one-sided write, at its moment.

Owns the rules that no engine can check, since each sees one side only, and the moments at which ambushes lie
in wait (faults/ambush.py). A broken rule is told at once: whether bytes come to harm by it is a matter of
luck, and a judge who waits for wrong tokens waits for thousands of worlds.

    a lane is claimed    its grant is open
    a block is tagged    its receiver still keeps the blocks of that use of the slot
    a lane is let go     the same: until then its writer may write
    a layer is refuted   some write of those that went there was lost or bent on its way

It also keeps which numerics classes each token owes to, for the judge.

Told of every word by heap.py; changes nothing. Knows no requests, and no faults but of writes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.words import OPEN, POISON, WordLayout, grant_tag, payload_tag
from microserve.protocol.messages.kv.grant import MAX_LANES

AT_ONCE_S = 0.05
"""A slot that is used again so soon may meet the writers of its last use."""


class Moment(Enum):
    """When a writer is watched: the word is written, and its writer has not gone on."""

    CLAIM = "claim"
    ROWS = "rows"
    """Some rows of a layer are in, and others are to come."""
    LAYER = "layer"
    """All of a lane's rows are in in this layer, and not in others."""
    WHOLE = "whole"
    """All of a lane's rows are in, and it is still held."""
    FIRST_TOKEN = "first token"
    LET_GO = "let go"


class Meeting(Enum):
    """Rare situations between a writer and a receiver; campaigns count the worlds that had them."""

    TWO_LANES = "two lanes in a grant at a time"
    GAP = "rows came in behind a gap"
    SEALED_HELD = "sealed while a lane was held"
    QUARANTINED_HELD = "closed while a lane was held"
    LATE_WRITER = "a writer came after its grant's end"
    LATE_MEETS_NEXT = "a late writer met the slot's next grant"
    SLOT_AGAIN = "a slot was used again at once"


class Lane(NamedTuple):
    receiver: int
    """Incarnation of the heap's owner."""
    slot: int
    lane: int


Watcher = Callable[[Moment, int, Lane, int], None]
"""Told the moment, the writer's incarnation, the lane and its grant's generation."""


class _Place(NamedTuple):
    """What a word of a slot means."""

    kind: str
    slot: int
    lane: int
    layer: int = 0


@dataclass(slots=True)
class _Claim:
    writer: int
    generation: int
    begin: int
    num_tokens: int
    layers: set[int]
    """Whose rows are all in."""


@lru_cache(maxsize=64)
def _places(words: WordLayout) -> dict[int, _Place]:
    places: dict[int, _Place] = {}
    for slot in range(words.num_slots):
        for lane in range(MAX_LANES):
            places[words.begin(slot, lane)] = _Place("begin", slot, lane)
            places[words.end(slot, lane)] = _Place("end", slot, lane)
            places[words.claim(slot, lane)] = _Place("claim", slot, lane)
            places[words.first_token(slot, lane)] = _Place("first token", slot, lane)
            for layer in range(words.num_layers):
                places[words.arrival(slot, lane, layer)] = _Place("arrival", slot, lane, layer)
    return places


@lru_cache(maxsize=64)
def _states(words: WordLayout) -> dict[int, int]:
    return {words.state(slot): slot for slot in range(words.num_slots)}


class Witness:
    """One a mesh."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.violations: list[str] = []
        self.met: Counter[Meeting] = Counter()
        self.watcher: Watcher | None = None
        self._clock = clock
        self._tables: dict[int, GrantTable] = {}
        """Of living receivers, by incarnation."""
        self._tags: dict[int, tuple[int, int, int]] = {}
        """(receiver, slot, generation) by tag."""
        self._closed_at: dict[tuple[int, int], float] = {}
        self._bounds: dict[tuple[Lane, str], int] = {}
        self._claims: dict[Lane, _Claim] = {}
        """Of lanes that are held."""
        self._spoilt: Counter[int] = Counter()
        """Writes that were lost or bent, by receiver."""
        self.marks: dict[tuple[str, int], set[int]] = {}
        """By request, as its client knows it, and output offset: what the token owed to, each time that it
        was made (marked_runner.py)."""

    # --- engines -----------------------------------------------------------------------------------

    def join(self, incarnation: int, table: GrantTable) -> None:
        self._tables[incarnation] = table

    def leave(self, incarnation: int) -> None:
        """The engine is gone: its memory is nobody's any more, and it holds no lane."""
        self._judge_layers(incarnation)
        self._tables.pop(incarnation, None)
        self._claims = {
            lane: claim
            for lane, claim in self._claims.items()
            if incarnation not in (lane.receiver, claim.writer)
        }

    def table_of(self, lane: Lane) -> GrantTable | None:
        """The receiver's, if it lives."""
        return self._tables.get(lane.receiver)

    def finish(self) -> list[str]:
        """At the end of a world: all that was wrong."""
        for incarnation in list(self._tables):
            self._judge_layers(incarnation)
        return self.violations

    def _judge_layers(self, incarnation: int) -> None:
        table = self._tables.get(incarnation)
        if table is not None and table.num_refuted and not self._spoilt[incarnation]:
            self._tell(f"{table.num_refuted} layers were taken for whole that were not; no write was spoilt")
            table.num_refuted = 0

    # --- tokens ------------------------------------------------------------------------------------

    def sampled(self, request_id: str, offset: int, mark: int) -> None:
        """An engine has made an output token of rows with these marks."""
        self.marks.setdefault((request_id.partition("~")[0], offset), set()).add(mark)

    # --- the receiver's side -----------------------------------------------------------------------

    def stored(self, receiver: int, words: WordLayout, word: int, value: int) -> None:
        """The owner has written one of its words."""
        slot = _states(words).get(word)
        if slot is None:
            return
        if value & 0xFF != OPEN:
            self._closed_at[receiver, slot] = self._clock()
            return
        generation = value >> 8
        tag = grant_tag(receiver, slot, generation)
        self._tags[tag] = self._tags[payload_tag(tag)] = (receiver, slot, generation)
        closed_at = self._closed_at.get((receiver, slot), float("-inf"))
        self.met[Meeting.SLOT_AGAIN] += self._clock() - closed_at <= AT_ONCE_S

    # --- the writer's side -------------------------------------------------------------------------

    def spoilt(self, receiver: int) -> None:
        """A fault has dropped or changed what was written there."""
        self._spoilt[receiver] += 1

    def signalled(self, writer: int, receiver: int, words: WordLayout, word: int, value: int) -> None:
        """A word of a lane is written."""
        place = _places(words).get(word)
        if place is None:
            return
        lane = Lane(receiver, place.slot, place.lane)
        if place.kind in ("begin", "end"):
            self._bounds[lane, place.kind] = value & 0xFFFFFFFF
        elif place.kind == "claim":
            self._claimed(writer, lane, value >> 8)
        elif (claim := self._claims.get(lane)) is not None:
            if place.kind == "first token":
                self._watch(Moment.FIRST_TOKEN, lane, claim)
            elif not value & POISON:
                self._arrived(lane, claim, place.layer, value & 0xFFFFFFFF, words.num_layers)

    def _claimed(self, writer: int, lane: Lane, generation: int) -> None:
        begin, end = self._bounds.get((lane, "begin"), 0), self._bounds.get((lane, "end"), 0)
        table = self.table_of(lane)
        if table is not None and (stage := table.stage(lane.slot, generation)) != "open":
            self._tell(f"{writer:#x} claimed {_name(lane, generation)}, which is {stage or 'forgotten'}")
        for other, theirs in self._claims.items():
            self.met[Meeting.TWO_LANES] += other[:2] == lane[:2] and theirs.generation == generation
        claim = self._claims[lane] = _Claim(writer, generation, begin, end - begin, set())
        self._watch(Moment.CLAIM, lane, claim)

    def _arrived(self, lane: Lane, claim: _Claim, layer: int, count: int, num_layers: int) -> None:
        moment = Moment.ROWS
        if count >= claim.num_tokens:
            claim.layers.add(layer)
            moment = Moment.WHOLE if len(claim.layers) == num_layers else Moment.LAYER
        table = self.table_of(lane)
        if table is not None and count and table.stage(lane.slot, claim.generation) == "open":
            frontier = table.frontier(table.grant_id(lane.slot, claim.generation), layer)
            self.met[Meeting.GAP] += frontier < claim.begin
        self._watch(moment, lane, claim)

    def tagged(self, writer: int, tag: int) -> None:
        """A block is written, by a writer that names the grant by its tag."""
        receiver, slot, generation = self._tags.get(tag, (0, 0, 0))
        table = self._tables.get(receiver)
        if table is not None and not table.stage(slot, generation):
            name = f"grant {receiver:x}/{slot}/{generation}"
            self._tell(f"{writer:#x} wrote under {name}, whose blocks are its receiver's to keep no more")

    def letting_go(self, writer: int, lane: Lane, state: int) -> None:
        """It is about to; ``state`` is the slot's STATE."""
        claim, table = self._claims.pop(lane, None), self.table_of(lane)
        if table is None:
            return
        if claim is None:
            if not self._spoilt[lane.receiver]:  # else its claim may have been lost
                self.met[Meeting.LATE_WRITER] += 1
                self.met[Meeting.LATE_MEETS_NEXT] += state & 0xFF == OPEN
            return
        stage = table.stage(lane.slot, claim.generation)
        self.met[Meeting.SEALED_HELD] += stage == "sealed"
        self.met[Meeting.QUARANTINED_HELD] += stage == "quarantined"
        if not stage:
            self._tell(f"{writer:#x} held {_name(lane, claim.generation)} until now, and it is forgotten")
        self._watch(Moment.LET_GO, lane, claim)

    def _watch(self, moment: Moment, lane: Lane, claim: _Claim) -> None:
        if self.watcher is not None:
            self.watcher(moment, claim.writer, lane, claim.generation)

    def _tell(self, what: str) -> None:
        self.violations.append(f"memory: at {self._clock():.3f} {what}")


def _name(lane: Lane, generation: int) -> str:
    return f"lane {lane.lane} of grant {lane.receiver:x}/{lane.slot}/{generation}"
