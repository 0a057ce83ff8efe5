"""Grants under any interleaving of payloads, rows, decoders and ends: what counts is right, and stays so.

Lanes are of any bounds, also such as meet; payloads may be torn, may lose, and come in any pieces; a decoder
does one piece when it is told to. Writes take effect at once: those that come late are of
test_grant_machine.py.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from numpy.typing import NDArray

from microserve.kvcache.codec.codec import decode
from microserve.kvcache.codec.profile import Profile
from microserve.kvcache.grant.table import Discharged, Expired, Settled
from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.errors import CacheFull, TransferFailed
from microserve.protocol.messages.kv.grant import Grant
from tests.support.examples import examples
from tests.support.kvcache.encoded import (
    LAYOUT,
    LOSSLESS,
    LOSSY,
    EncodedWorld,
    codec_of,
    read_rows,
    rows_of,
)
from tests.support.kvcache.kv_samples import is_painted, paint

SIZE, LAYERS = LAYOUT.block_size, LAYOUT.num_layers
LENGTH = 24
SEEDS = 3
PROFILES = {"exact": LOSSLESS, "lossy": LOSSY, "torn": LOSSLESS}


@functools.cache
def source(seed: int) -> NDArray[np.uint8]:
    return rows_of(LAYOUT, LENGTH, seed)


@functools.cache
def payload_of(seed: int, layer: int, lo: int, hi: int, profile: Profile) -> NDArray[np.uint8] | None:
    keys, values = (np.ascontiguousarray(half[lo:hi]) for half in source(seed)[layer])
    out = np.empty(keys.nbytes + values.nbytes - 1, np.uint8)
    nbytes = codec_of(profile, LAYOUT).encode(layer, keys, values, out)
    return None if nbytes is None else out[:nbytes]


def decoded(payload: NDArray[np.uint8], layer: int, num_tokens: int) -> NDArray[np.uint8]:
    rows = np.empty((2, num_tokens, LAYOUT.row_nbytes), np.uint8)
    decode(payload, layer, LAYOUT.geometry, rows[0], rows[1])
    return rows


@dataclass
class Lane:
    model: Model
    writer: LaneWriter
    incarnation: int
    is_over: bool = False


@dataclass
class Model:
    grant: Grant
    seed: int
    may_lose: bool
    matched_blocks: list[int]
    expected: NDArray[np.uint8]
    """``[layer][K | V][token][byte]``: the source, with what lossy payloads made of it."""
    lanes: list[Lane] = field(default_factory=list)
    state: str = "open"
    has_lost: bool = False
    """A payload that loses was put into it."""

    @property
    def is_live(self) -> bool:
        return self.state in ("open", "sealed")


class EncodedMachine(RuleBasedStateMachine):
    models = Bundle("models")
    lanes = Bundle("lanes")

    @initialize()
    def begin(self) -> None:
        self.world = EncodedWorld()
        self.now = 0.0
        self.all: list[Model] = []
        self.painted: list[tuple[list[int], int]] = []

    @rule(
        target=models,
        matched=st.sampled_from([0, SIZE]),
        num_tokens=st.integers(1, LENGTH - SIZE),
        seed=st.integers(0, SEEDS - 1),
        may_lose=st.booleans(),
    )
    def open(self, matched: int, num_tokens: int, seed: int, may_lose: bool) -> Model | object:
        pool, end = self.world.pool, matched + num_tokens
        num_matched, num_new = matched // SIZE, LAYOUT.num_blocks_for(num_tokens)
        if pool.num_free < num_matched + num_new:
            return multiple()
        blocks = pool.allocate(num_matched + num_new)
        bounds = blocks[:num_matched], matched, blocks[num_matched:], end, self.now
        try:
            grant = self.world.table.open("r", "o", *bounds, may_lose=may_lose)
        except CacheFull:
            pool.free(blocks)
            return multiple()
        self.world.table.consume(grant.grant_id)
        model = Model(grant, seed, may_lose, blocks[:num_matched], source(seed).copy())
        self.all.append(model)
        return model

    @rule(target=lanes, model=models, index=st.integers(0, 3), encoded=st.booleans(), data=st.data())
    def claim(self, model: Model, index: int, encoded: bool, data: st.DataObject) -> Lane | object:
        """Of any bounds, most often of such as blocks have."""
        grant = model.grant
        borders = [*range(grant.matched, grant.end, SIZE), grant.end]
        begin = data.draw(st.sampled_from(borders) | st.integers(grant.matched, grant.end))
        end = data.draw(st.sampled_from(borders).filter(lambda each: each >= begin) | st.just(grant.end))
        return self._claim(model, index, begin, end, encoded=encoded) or multiple()

    def _claim(self, model: Model, index: int, begin: int, end: int, *, encoded: bool) -> Lane | None:
        grant = model.grant
        writer = self.world.writer(
            *(grant, source(model.seed)), lane=index, begin=begin, end=end, encoded=encoded
        )
        try:
            writer.claim()
        except TransferFailed:
            return None
        lane = Lane(model, writer, self.world.num_senders)
        model.lanes.append(lane)
        return lane

    @rule(
        lane=lanes,
        layer=st.integers(0, LAYERS - 1),
        count=st.integers(1, 12),
        kind=st.sampled_from(["rows", "exact", "exact", "lossy", "torn"]),
    )
    def put(self, lane: Lane, layer: int, count: int, kind: str) -> None:
        model, writer = lane.model, lane.writer
        if lane.is_over:
            return
        lo = writer._next[layer]
        lo, hi = writer.plan.cut(lo, lo + count)
        if lo >= hi:
            return
        profile = PROFILES.get(kind) if writer.is_encoded else None
        payload = payload_of(model.seed, layer, lo, hi, profile) if profile is not None else None
        try:
            if payload is None or profile is None:
                writer.put_layer(layer, range(LENGTH // SIZE), lo, hi)
                return
            if kind == "torn":
                payload = payload.copy()
                payload[-1] ^= 0x55
            writer.put_payload(layer, payload, lo, hi)
        except TransferFailed:
            assert model.state != "open"
            return
        if profile is LOSSY:
            model.has_lost = True
            model.expected[layer, :, lo:hi] = decoded(payload, layer, hi - lo)

    @rule(lane=lanes, kind=st.sampled_from(["rows", "exact", "exact", "lossy"]))
    def put_the_rest(self, lane: Lane, kind: str) -> None:
        for layer in range(LAYERS):
            self.put(lane, layer, LENGTH, kind)

    @rule(
        target=lanes, model=models, index=st.integers(0, 1), kind=st.sampled_from(["exact", "lossy", "torn"])
    )
    def transfer(self, model: Model, index: int, kind: str) -> Lane | object:
        """All of a grant, by one lane that nothing interrupts."""
        lane = self._claim(model, index, model.grant.matched, model.grant.end, encoded=True)
        if lane is None:
            return multiple()
        self.put_the_rest(lane, kind)
        return lane

    @rule(target=lanes, model=models, kind=st.sampled_from(["exact", "lossy"]))
    def arrive(self, model: Model, kind: str) -> Lane | object:
        """A whole one, decoded and in use, whose writer has not let go."""
        lane = self.transfer(model, 0, kind)
        self.work_it_off()
        self.seal(model)
        return lane

    @rule(model=models)
    def rows_beside(self, model: Model) -> None:
        """All of a grant as rows, by another lane; whoever reads it may have begun."""
        if (lane := self._claim(model, 2, model.grant.matched, model.grant.end, encoded=False)) is not None:
            self.put_the_rest(lane, "rows")

    @rule()
    def work_it_off(self) -> None:
        for place in range(len(self.world.decoder.lanes) + 1):
            self.work(place, 20)

    @rule(place=st.integers(0, 7), count=st.integers(1, 4))
    def work(self, place: int, count: int) -> None:
        self.world.table.poll(self.now)
        self._note()
        if lanes := self.world.decoder.lanes:
            for _ in range(count):
                lanes[place % len(lanes)].advance()

    @rule(model=models)
    def seal(self, model: Model) -> None:
        if model.state == "open" and self.world.table.is_complete(model.grant.grant_id):
            self.world.table.seal(model.grant.grant_id)
            model.state = "sealed"

    @rule(model=models)
    def close(self, model: Model) -> None:
        if model.is_live:
            self.world.table.close(model.grant.grant_id, self.now)
            model.state = "closed"

    @rule(lane=lanes, how=st.sampled_from(["finish", "fail", "kill"]))
    def end(self, lane: Lane, how: str) -> None:
        if lane.is_over:
            return
        lane.is_over = True
        if how == "kill":
            self.world.registry.kill(lane.incarnation)
        else:
            getattr(lane.writer, how)()

    @rule(count=st.integers(1, 3), value=st.integers(1, 255))
    def others_take_blocks(self, count: int, value: int) -> None:
        if count <= self.world.pool.num_free and len(self.painted) < 2:
            blocks = self.world.pool.allocate(count)
            paint(self.world.heap, blocks, value)
            self.painted.append((blocks, value))

    @rule()
    def others_let_go(self) -> None:
        if self.painted:
            self.world.pool.free(self.painted.pop()[0])

    def _note(self) -> None:
        """What ``poll`` of the table has said is taken from what it is now."""
        for model in self.all:
            is_there = model.grant.grant_id in self.world.table.live_ids
            if model.state == "sealed" and not is_there:
                model.state = "settled"

    @rule()
    def poll(self) -> None:
        self.now += 0.1
        for event in self.world.table.poll(self.now):
            assert isinstance(event, Settled | Discharged) and not isinstance(event, Expired)
        self._note()

    @rule(model=models)
    def use_and_free(self, model: Model) -> None:
        if model.state == "settled":
            self.world.pool.free(model.matched_blocks + model.grant.blocks)
            model.state = "freed"

    @invariant()
    def nobody_s_books_are_wrong(self) -> None:
        self.world.check()

    @invariant()
    def what_counts_is_right_and_stays_so(self) -> None:
        table = self.world.table
        for model in self.all:
            grant = model.grant
            if model.state not in ("open", "sealed", "settled"):
                continue
            ends = [grant.end] * LAYERS
            if model.state == "open":
                ends = [table.frontier(grant.grant_id, layer) for layer in range(LAYERS)]
            for layer, end in enumerate(ends):
                count = end - grant.matched
                if count == 0:
                    continue
                rows = read_rows(self.world.heap, grant.blocks[: LAYOUT.num_blocks_for(count)], count)[layer]
                exact = source(model.seed)[layer, :, grant.matched : end]
                made = model.expected[layer, :, grant.matched : end]
                # A plain lane may have written over what a lossy one made: either one's row is right.
                is_right = (rows == exact).all(axis=2) | (rows == made).all(axis=2)
                assert is_right.all(), (grant.grant_id, layer)
                if not model.may_lose:
                    assert (rows == exact).all()
                if not (rows == exact).all() and model.state == "sealed":
                    assert table.is_lossy(grant.grant_id), "what lost is known to have"

    @invariant()
    def a_lossy_payload_is_never_taken_without_leave(self) -> None:
        for model in self.all:
            if model.is_live and not model.may_lose:
                assert not self.world.table.is_lossy(model.grant.grant_id)

    @invariant()
    def no_late_write_lands_in_another_s_blocks(self) -> None:
        for blocks, value in self.painted:
            assert is_painted(self.world.heap, blocks, value)

    def teardown(self) -> None:
        for model in self.all:
            for lane in model.lanes:
                self.end(lane, "kill")
            self.close(model)
        self.poll()
        for model in self.all:
            self.use_and_free(model)
        while self.painted:
            self.others_let_go()
        assert self.world.pool.num_free == LAYOUT.num_blocks
        super().teardown()


TestEncoded = EncodedMachine.TestCase
TestEncoded.settings = settings(max_examples=examples(100), stateful_step_count=40, deadline=None)
