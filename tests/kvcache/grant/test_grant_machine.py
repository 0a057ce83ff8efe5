"""Grants under any interleaving: writers whose writes arrive arbitrarily late, that stop, give up and die."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import Discharged, Expired, GrantTable, Settled
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.protocol.errors import CacheFull, TransferFailed
from tests.support.examples import examples
from tests.support.kvcache.grant_model import (
    BLOCK_SIZE,
    LEASE_S,
    NUM_BLOCKS,
    NUM_LAYERS,
    NUM_SLOTS,
    RECEIVER,
    Lane,
    LatePeer,
    ModelGrant,
)
from tests.support.kvcache.kv_samples import fill, is_painted, make_layout, mismatches, paint


class GrantMachine(RuleBasedStateMachine):
    grants = Bundle("grants")
    over = Bundle("over")
    """Grants that nobody wants any more; their writers do not know."""
    lanes = Bundle("lanes")
    loans = Bundle("loans")

    @initialize(num_slots=st.integers(1, NUM_SLOTS))
    def begin(self, num_slots: int) -> None:
        """With one slot, each grant meets what the last one's writers do."""
        self.num_slots = num_slots
        self.registry = MemoryRegistry()
        layout = make_layout(num_blocks=NUM_BLOCKS, num_layers=NUM_LAYERS, block_size=BLOCK_SIZE)
        self.heap = MemoryHeap(layout, incarnation=RECEIVER, registry=self.registry, num_slots=num_slots)
        self.pool = BlockPool(NUM_BLOCKS)
        self.table = GrantTable(
            *(self.heap, self.pool),
            engine_id="e",
            incarnation=RECEIVER,
            lease_s=LEASE_S,
            verify_checksums=True,
        )
        self.now = 0.0
        self.count = RECEIVER
        self.all_grants: list[ModelGrant] = []
        self.painted: dict[int, tuple[list[int], int]] = {}

    # --- the receiver

    @rule(target=grants, num_matched=st.integers(0, 1), num_tokens=st.integers(0, 11) | st.integers(5, 11))
    def open(self, num_matched: int, num_tokens: int) -> ModelGrant | object:
        num_new = -(-num_tokens // BLOCK_SIZE)
        matched, end = num_matched * BLOCK_SIZE, num_matched * BLOCK_SIZE + num_tokens
        num_busy = sum(model.is_live or model.state == "quarantined" for model in self.all_grants)
        try:
            blocks = self.pool.allocate(num_matched + num_new)
        except CacheFull:
            return multiple()
        try:
            grant = self.table.open(
                "r", "o", blocks[:num_matched], matched, blocks[num_matched:], end, self.now
            )
        except CacheFull:
            assert num_busy == self.num_slots
            self.pool.free(blocks)
            return multiple()
        assert num_busy < self.num_slots
        self.count += 1
        model = ModelGrant(grant, self.count, self.now + LEASE_S, blocks[:num_matched])
        self.all_grants.append(model)
        return model

    @rule(model=grants)
    def consume(self, model: ModelGrant) -> None:
        if model.is_live:
            self.table.consume(model.grant.grant_id)
            model.is_consumed = True

    @rule(model=grants)
    def seal(self, model: ModelGrant) -> None:
        if model.state == "open" and model.is_complete:
            self.table.seal(model.grant.grant_id)
            model.state = "sealed"

    @rule(target=over, model=consumes(grants))
    def close(self, model: ModelGrant) -> ModelGrant:
        if model.is_live:
            self.table.close(model.grant.grant_id, self.now)
            self._model_close(model)
        return model

    @rule(seconds=st.sampled_from([0.0, 0.5, LEASE_S / 2]))
    def poll(self, seconds: float) -> None:
        self.now += seconds
        expected: list[object] = []
        for model in self.all_grants:
            grant, is_drained = model.grant, not any(lane.holds for lane in model.lanes)
            if model.state == "open" and not model.is_consumed and self.now >= model.expires_at:
                self._model_close(model)
                expected.append(Expired(grant.grant_id, "r", "o"))
            elif model.state == "sealed" and is_drained:
                model.state = "settled"
                expected.append(Settled(grant.grant_id, "r"))
            elif model.state == "quarantined" and is_drained:
                model.state = "freed"
                expected.append(Discharged(grant.grant_id, "r", len(grant.blocks)))

        assert self.table.poll(self.now) == expected

    @rule(model=grants)
    def use_and_free(self, model: ModelGrant) -> None:
        """A request whose grant has settled reads what it got, and ends."""
        if model.state == "settled":
            grant = model.grant
            assert not mismatches(
                self.heap, grant.blocks, grant.matched, grant.matched, grant.end, model.seed
            )
            self.pool.free(model.matched_blocks + grant.blocks)
            model.state = "freed"

    @rule(target=loans, count=st.integers(1, 4))
    def use_other_blocks(self, count: int) -> int | object:
        """Another request takes blocks and writes its own KV: it must stay as it is."""
        if count > self.pool.num_free:
            return multiple()
        blocks = self.pool.allocate(count)
        self.count += 1
        paint(self.heap, blocks, self.count % 256)
        self.painted[self.count] = blocks, self.count % 256
        return self.count

    @rule(loan=consumes(loans))
    def free_other_blocks(self, loan: int) -> None:
        self.pool.free(self.painted.pop(loan)[0])

    # --- the writers

    @rule(target=lanes, model=grants, index=st.integers(0, 2), data=st.data())
    def claim(self, model: ModelGrant, index: int, data: st.DataObject) -> Lane | object:
        """Also of grants that are closed and of lanes in use."""
        grant = model.grant
        begin = data.draw(st.just(grant.matched) | st.integers(grant.matched, grant.end))
        end = data.draw(st.just(grant.end) | st.integers(begin, grant.end))
        self.count += 1
        sending = MemoryHeap(
            make_layout(num_blocks=5, num_layers=NUM_LAYERS, block_size=BLOCK_SIZE),
            incarnation=self.count,
            registry=self.registry,
        )
        fill(sending, range(5), grant.end, model.seed)
        peer = LatePeer(sending.attach(self.heap.address))
        writer = LaneWriter(sending, peer, grant, index, begin, end, checksums=True)
        is_taken = any(lane.index == index and (lane.holds or lane.is_visible) for lane in model.lanes)
        try:
            writer.claim()
        except TransferFailed:
            assert model.state != "open" or is_taken
            peer.deliver(1)
            return multiple()
        assert model.state == "open"
        assert not is_taken
        lane = Lane(
            *(model, writer, peer, self.count, index, begin, end),
            sent=[begin] * NUM_LAYERS,
            here=[begin] * NUM_LAYERS,
        )
        lane.when_delivered(lambda: setattr(lane, "is_visible", True))
        model.lanes.append(lane)
        return lane

    @rule(target=lanes, model=over, index=st.integers(0, 2), data=st.data())
    def claim_late(self, model: ModelGrant, index: int, data: st.DataObject) -> Lane | object:
        """Whoever was asked to send before the grant was closed; its slot may serve another one by now."""
        return self.claim(model, index, data)

    @rule(lane=lanes, layer=st.integers(0, NUM_LAYERS - 1), count=st.integers(1, 12))
    def put(self, lane: Lane, layer: int, count: int) -> None:
        lo = lane.sent[layer]
        hi = min(lo + count, lane.end)
        if lane.is_over or lo == hi:
            return
        try:
            lane.writer.put_layer(layer, range(5), lo, hi)
        except TransferFailed:
            assert lane.grant.state != "open"
            return
        assert lane.grant.state == "open"
        lane.sent[layer] = hi
        lane.when_delivered(lambda: lane.here.__setitem__(layer, hi))

    @rule(lane=lanes)
    def put_the_rest(self, lane: Lane) -> None:
        for layer in range(NUM_LAYERS):
            self.put(lane, layer, 99)

    @rule(lane=lanes)
    def deliver_all(self, lane: Lane) -> None:
        lane.peer.deliver(len(lane.peer.on_the_way))

    @rule(model=grants, data=st.data())
    def transfer(self, model: ModelGrant, data: st.DataObject) -> None:
        """A writer that nothing interrupts."""
        lane = self.claim(model, 0, data)
        if isinstance(lane, Lane):
            self.put_the_rest(lane)
            self.end(lane, False)
            self.deliver_all(lane)

    @rule(target=lanes, model=grants, data=st.data())
    def fill(self, model: ModelGrant, data: st.DataObject) -> Lane | object:
        """All is in and sealed, and its writer has not let go."""
        lane = self.claim(model, 0, data)
        if isinstance(lane, Lane):
            self.put_the_rest(lane)
            self.deliver_all(lane)
            self.seal(model)
        return lane

    @rule(lane=lanes, token=st.integers(0, 3))
    def sample(self, lane: Lane, token: int) -> None:
        if not lane.is_over:
            lane.writer.set_first_token(token)
            lane.when_delivered(lambda: setattr(lane, "first_token", token))

    @rule(lane=consumes(lanes), fails=st.booleans())
    def end(self, lane: Lane, fails: bool) -> None:
        if lane.is_over:
            return
        lane.is_over = True
        if fails:
            lane.writer.fail()
            # Poison for every layer, then let_go; the first one counts.
            lane.when_delivered(lambda: setattr(lane, "is_poisoned", True), -1 - NUM_LAYERS)
        else:
            lane.writer.finish()
        lane.when_delivered(lambda: setattr(lane, "holds", False))

    @rule(data=st.data(), count=st.integers(1, 6))
    def deliver(self, data: st.DataObject, count: int) -> None:
        """Some of what one writer has written takes effect, in its order."""
        lanes = [lane for model in self.all_grants for lane in model.lanes if lane.peer.on_the_way]
        if not lanes:
            return
        data.draw(st.sampled_from(lanes)).peer.deliver(count)

    @rule(lane=consumes(lanes))
    def kill(self, lane: Lane) -> None:
        """At any moment: what was on the way is never written."""
        lane.peer.on_the_way.clear()
        self.registry.kill(lane.incarnation)
        lane.is_over = True
        lane.holds = False

    # --- what must always hold

    @invariant()
    def nobody_s_books_are_wrong(self) -> None:
        self.table.check_integrity()
        self.pool.check_integrity()
        counts = self.table.counts(self.now)
        states = [model.state for model in self.all_grants]
        assert counts.num_open == states.count("open")
        assert counts.num_sealed == states.count("sealed")
        assert counts.num_quarantined == states.count("quarantined")

    @invariant()
    def no_block_in_a_writer_s_reach_can_be_taken(self) -> None:
        free = self.pool.allocate(self.pool.num_free)
        self.pool.free(free)
        for model in self.all_grants:
            if any(lane.holds for lane in model.lanes):
                assert not set(model.grant.blocks) & set(free)

    @invariant()
    def no_late_write_lands_in_another_s_blocks(self) -> None:
        for blocks, value in self.painted.values():
            assert is_painted(self.heap, blocks, value)

    @invariant()
    def the_receiver_sees_what_has_arrived(self) -> None:
        for model in self.all_grants:
            if not model.is_live:
                continue
            grant = model.grant
            for layer in range(NUM_LAYERS):
                frontier = model.frontier(layer)
                assert self.table.frontier(grant.grant_id, layer) == frontier
                assert not mismatches(
                    *(self.heap, grant.blocks, grant.matched, grant.matched, frontier, model.seed),
                    layers=[layer],
                )
                if self.table.layer_complete(grant.grant_id, layer):
                    self.table.verify(grant.grant_id, layer)
            assert self.table.is_complete(grant.grant_id) == model.is_complete
            assert (self.table.poisoned(grant.grant_id) is not None) == model.is_hopeless
            assert self.table.first_token(grant.grant_id) == model.first_token

    def teardown(self) -> None:
        """Whatever happened: once all writers are gone and all requests over, every block is free."""
        for model in self.all_grants:
            for lane in model.lanes:
                self.kill(lane)
            self.close(model)
        self.poll(LEASE_S)
        for model in self.all_grants:
            self.use_and_free(model)
        for blocks, _ in self.painted.values():
            self.pool.free(blocks)
        assert self.pool.num_free == NUM_BLOCKS
        assert self.table.counts(self.now).num_free_slots == self.num_slots
        super().teardown()

    def _model_close(self, model: ModelGrant) -> None:
        model.state = "quarantined" if any(lane.holds for lane in model.lanes) else "freed"


TestGrants = GrantMachine.TestCase
TestGrants.settings = settings(max_examples=examples(200), stateful_step_count=50, deadline=None)
