"""Who runs in the next step, beside what the engine's tests show of it."""

from __future__ import annotations

import pytest

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.heap.local import MemoryHeap, MemoryRegistry
from microserve.kvcache.layout import KvLayout
from microserve.kvcache.prefix.cache import PrefixCache
from microserve.kvcache.prefix.hash import HashChain
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Scored
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.request.sequence import Sequence
from microserve.services.engine.core.scheduler import Scheduler, Step

BLOCK_SIZE, BUDGET, NUM_SCORED = 16, 32, 10


class World:
    def __init__(self, num_blocks: int = 64, num_with_memory: int | None = None) -> None:
        layout = KvLayout("m", 1, num_blocks, BLOCK_SIZE, 1, 4, "float16")
        limit = num_blocks if num_with_memory is None else num_with_memory
        pool = BlockPool(num_blocks, lambda first, count: max(first, min(first + count, limit)))
        heap = MemoryHeap(layout, incarnation=1, registry=MemoryRegistry(), num_slots=1)
        grants = GrantTable(heap, pool, engine_id="e", incarnation=1, lease_s=1.0, verify_checksums=False)
        self.memory = KvMemory(pool, PrefixCache(pool, BLOCK_SIZE, "m"), grants)
        self.preempted: list[Sequence] = []
        self.scheduler = Scheduler(
            self.memory,
            max_num_seqs=8,
            max_num_batched_tokens=BUDGET,
            max_num_scored=NUM_SCORED,
            eos_token_ids=frozenset(),
            on_preempt=self.preempted.append,
        )
        self._number = 0

    def sequence(
        self, num_tokens: int, num_prompt_tokens: int | None = None, *, prompt_logprobs: int | None = None
    ) -> Sequence:
        self._number += 1
        return Sequence(
            sequence_id=self._number,
            owner=b"o",
            request_id=f"r{self._number}",
            call_id=self._number,
            token_ids=[self._number] * num_tokens,
            num_prompt_tokens=num_tokens if num_prompt_tokens is None else num_prompt_tokens,
            params=SamplingParams(max_tokens=100, prompt_logprobs=prompt_logprobs),
            deadline=1e9,
            arrived_at=0.0,
            chain=HashChain(b"", BLOCK_SIZE),
        )

    def received(self, num_tokens: int, num_missing: int) -> Sequence:
        """Its KV came from elsewhere, but for the last ``num_missing`` tokens."""
        sequence = self.sequence(num_tokens, num_tokens - 1)
        assert self.memory.grow(sequence, num_tokens)
        sequence.num_computed = num_tokens - num_missing
        self.scheduler.add_ready(sequence)
        return sequence

    def step(self) -> Step:
        step = self.scheduler.schedule(0.0)
        assert step is not None
        for sequence, chunk in zip(step.sequences, step.batch.chunks, strict=True):
            sequence.num_computed = chunk.start + len(chunk.token_ids)
            if chunk.score is not None:
                sequence.take_scored(Scored(bytes(8 * len(chunk.score.targets)), 0))
        return step


def shares(step: Step) -> dict[int, int]:
    return {chunk.sequence_id: len(chunk.token_ids) for chunk in step.batch.chunks}


@pytest.fixture
def world() -> World:
    return World()


def test_a_received_sequence_that_lacks_one_token_does_not_wait_for_a_prefill(world: World) -> None:
    prefill = world.sequence(200)
    world.scheduler.add(prefill)
    assert shares(world.step()) == {prefill.sequence_id: BUDGET}
    first, second = world.received(40, 1), world.received(50, 1)

    step = world.step()

    assert shares(step) == {
        first.sequence_id: 1,
        second.sequence_id: 1,
        prefill.sequence_id: BUDGET - 2,
    }
    assert step.num_decodes == 2


def test_one_that_lacks_more_waits_its_turn_and_so_does_a_new_one(world: World) -> None:
    prefill = world.sequence(200)
    world.scheduler.add(prefill)
    world.step()
    world.received(40, 5)
    world.scheduler.add(world.sequence(1))

    assert shares(world.step()) == {prefill.sequence_id: BUDGET}


@pytest.mark.parametrize("world", [World(9), World(64, num_with_memory=9)])
def test_a_received_sequence_without_room_to_go_on_preempts_nobody(world: World) -> None:
    prefill = world.sequence(100)
    world.scheduler.add(prefill)
    world.step()
    received = world.received(
        5 * BLOCK_SIZE, 1
    )  # it needs another block, and the prefill the two that are left

    assert not world.memory.pool.has(9)
    world.memory.poll(0.0)  # from now on the machine is asked for memory again

    step = world.step()

    assert world.preempted == []
    assert prefill.sequence_id in shares(step)
    assert received.sequence_id not in shares(step)


def test_a_step_scores_no_more_rows_than_it_may_and_others_have_the_rest_of_it(world: World) -> None:
    scored = [world.sequence(18, prompt_logprobs=0) for _ in range(2)]
    for sequence in scored:
        world.scheduler.add(sequence)
    world.scheduler.add(other := world.sequence(40))
    steps = [world.step() for _ in range(4)]

    first, second = scored
    assert [shares(step)[first.sequence_id] for step in steps] == [10, 8, 1, 1]
    assert [shares(step).get(second.sequence_id) for step in steps] == [None, 3, 10, 5]
    assert [shares(step).get(other.sequence_id) for step in steps[:2]] == [22, 18]
    for step in steps:
        rows = [len(chunk.score.targets) for chunk in step.batch.chunks if chunk.score is not None]
        assert sum(rows) <= NUM_SCORED
    assert first.is_scored and second.is_scored
    assert first.scored is not None and first.scored.end == 18


def test_rows_that_are_told_are_not_scored_again_and_their_kv_may_come_from_the_cache(world: World) -> None:
    warm = world.sequence(40)
    warm.chain = world.memory.new_chain("")
    world.scheduler.add(warm)
    while warm.num_computed < 40:
        world.step()
        world.memory.insert(warm)
    sequence = world.sequence(40, prompt_logprobs=0)
    sequence.token_ids, sequence.chain = list(warm.token_ids), world.memory.new_chain("")
    world.scheduler.add(sequence)
    for _ in range(2):
        step = world.step()

    assert (sequence.num_cached, sequence.num_computed, sequence.num_scored) == (0, 20, 21)
    world.scheduler.preempt(sequence, step)
    for _ in range(2):
        world.step()

    assert sequence.num_cached == 16, "of 20 tokens whose rows were told, a block"
    assert (sequence.num_computed, sequence.num_scored) == (40, 40)
