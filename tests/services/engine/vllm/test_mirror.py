"""The mirror of vLLM's prefix cache: what it tells is what vLLM would find, whatever goes first."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.kvcache.prefix.index import PrefixIndex
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
)
from microserve.services.engine.vllm.mirror import Mirror

pytestmark = pytest.mark.slow

SIZE = 2
Path = tuple[int, ...]
"""A block by its tokens from the sequence's start, a token a block."""


def name_of(path: Path) -> bytes:
    return b"vllm" + bytes(path)


def stored(path: Path, salt: str = "", adapter: str = "", **more: object) -> BlockStored:
    parent = name_of(path[:-1]) + adapter.encode() if path[:-1] else None
    named = (adapter,) if adapter else ()
    keys = [(*named, salt) if salt and parent is None else named]
    number, name = (7, adapter) if adapter else (None, None)
    own = name_of(path) + adapter.encode()
    said = [own], parent, [path[-1]] * SIZE, SIZE, number, "GPU", name, keys if keys[0] else None
    return BlockStored(*said, **more)  # type: ignore[arg-type]


def hash_of(path: Path, salt: str = "", adapter: str = "") -> bytes:
    tokens = [token for token in path for _ in range(SIZE)]
    return block_hashes(tokens, SIZE, root_hash("m", adapter=adapter, salt=salt, revision="r"))[-1]


def fed(*events: KVEvent) -> Mirror:
    mirror = Mirror(SIZE, "m", "r")
    for event in events:
        mirror.take(KVEventBatch(0.0, [event]))
    return mirror


def test_what_comes_and_goes_in_one_batch_is_not_told_of() -> None:
    """KV that an early start began with, and that did not come."""
    mirror = fed(stored((1,)))
    mirror.take_events()
    events: list[KVEvent] = [stored((1, 2)), stored((1, 2, 3)), stored((1, 4))]
    events += [BlockRemoved([name_of(path)], "GPU") for path in ((1, 2, 3), (1, 2))]
    mirror.take(KVEventBatch(0.0, events))
    (told,) = mirror.take_events()
    assert isinstance(told, BlockStored) and told.block_hashes == [hash_of((1, 4))]
    assert mirror.num_blocks == 2


def test_what_comes_goes_and_comes_in_one_batch_is_told_of_once() -> None:
    mirror = fed(stored((1,)), stored((1, 2)), BlockRemoved([name_of((1,))], "GPU"))
    reader = Reader()
    reader.read(mirror.take_events())
    assert reader.known == set()
    back: list[KVEvent] = [stored((1,)), BlockRemoved([name_of((1,))], "GPU"), stored((1,))]
    mirror.take(KVEventBatch(0.0, back))
    reader.read(mirror.take_events())
    assert reader.known == {hash_of((1,)), hash_of((1, 2))}


class Reader:
    """What somebody who follows the mirror's events knows."""

    def __init__(self) -> None:
        self.known: set[int | bytes] = set()

    def read(self, events: list[KVEvent] | list[BlockStored]) -> None:
        for event in events:
            match event:
                case BlockStored(hashes, parent):
                    assert parent is None or parent in self.known, "a parent is told of before its children"
                    assert not self.known.intersection(hashes), "a block is told of once"
                    self.known.update(hashes)
                case BlockRemoved(hashes):
                    assert self.known.issuperset(hashes)
                    self.known.difference_update(hashes)
                case AllBlocksCleared():
                    self.known.clear()


def test_a_run_is_told_of_under_our_hashes() -> None:
    run = BlockStored([name_of((1,)), name_of((1, 2))], None, [1, 1, 2, 2], SIZE, None, "GPU")
    (event,) = fed(run).take_events()
    assert isinstance(event, BlockStored)
    assert event.block_hashes == [hash_of((1,)), hash_of((1, 2))] and event.parent_block_hash is None


def test_a_salt_is_part_of_the_hash_and_of_the_event() -> None:
    (event,) = fed(stored((1,), "tenant")).take_events()
    assert isinstance(event, BlockStored)
    assert event.block_hashes == [hash_of((1,), "tenant")] and event.extra_keys == [("tenant",)]


@pytest.mark.parametrize("salt", ["", "tenant", "sql"])
def test_an_adapter_is_part_of_the_hash_and_of_the_event(salt: str) -> None:
    mirror = fed(stored((1,), salt, "sql"), stored((1, 2), "", "sql"), stored((1,), salt))
    first, second, base = mirror.take_events()
    assert isinstance(first, BlockStored) and isinstance(second, BlockStored)
    assert first.block_hashes == [hash_of((1,), salt, "sql")]
    assert (first.lora_name, first.lora_id, first.extra_keys) == (
        "sql",
        7,
        [("sql", salt) if salt else ("sql",)],
    )
    assert (second.lora_name, second.lora_id, second.extra_keys) == ("sql", 7, [("sql",)])
    assert isinstance(base, BlockStored)
    assert base.block_hashes == [hash_of((1,), salt)] and (base.lora_name, base.lora_id) == (None, None)
    tokens = [1] * SIZE + [2] * SIZE
    assert mirror.holds(tokens, salt, "sql")
    assert not mirror.holds(tokens, salt) and not mirror.holds(tokens, salt, "poet")
    assert mirror.holds(tokens[:SIZE], salt)


NAMES = st.sampled_from(["", "sql", "poet"])


@given(st.lists(st.tuples(st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple), NAMES, NAMES)))
def test_an_index_that_reads_it_finds_each_under_its_own_names_alone(
    told: list[tuple[Path, str, str]],
) -> None:
    """Whatever of vLLM's cache is told of: nothing of one adapter or salt is found under another."""
    mirror, index = Mirror(SIZE, "m", "r"), PrefixIndex(SIZE, "m", 1 << 24, revision="r")
    for path, salt, adapter in told:
        for end in range(1, len(path) + 1):
            # A name of vLLM's own for each: its hash has adapter and salt in it.
            event = stored(path[:end], salt, adapter)
            tag = b"/" + salt.encode()
            parent = event.parent_block_hash
            event.block_hashes = [name + tag for name in event.block_hashes if isinstance(name, bytes)]
            event.parent_block_hash = parent + tag if isinstance(parent, bytes) else None
            mirror.take(KVEventBatch(0.0, [event]))
    index.apply("e", mirror.take_events())
    for path in {path for path, _, _ in told}:
        tokens = [token for token in path for _ in range(SIZE)]
        for other_salt in ("", "sql", "poet"):
            for other in ("", "sql", "poet"):
                ends = [
                    end
                    for known, s, a in told
                    if (s, a) == (other_salt, other)
                    for end in range(1, len(known) + 1)
                    if known[:end] == path[:end]
                ]
                found = index.lookup(tokens, other_salt, adapter=other)
                assert found == ({"e": max(ends) * SIZE} if ends else {})
                assert mirror.holds(tokens, other_salt, other) == (len(path) in ends)


def test_what_nobody_could_ask_for_is_left_out() -> None:
    images = BlockStored([name_of((1,))], None, [1, 1], SIZE, None, "GPU", None, [("image", 3)])
    offloaded = BlockStored([name_of((2,))], None, [2, 2], SIZE, None, "CPU")
    mirror = fed(images, offloaded, stored((3,), group_idx=1), stored((1, 2)))
    assert not mirror.has_events and mirror.num_blocks == 0


def test_a_block_waits_for_its_parent_to_come_back() -> None:
    mirror, reader = fed(stored((1,)), stored((1, 2)), BlockRemoved([name_of((1,))])), Reader()
    reader.read(mirror.take_events())
    assert reader.known == set() and mirror.num_blocks == 0
    mirror.take(KVEventBatch(0.0, [stored((1,))]))
    reader.read(mirror.take_events())
    assert reader.known == {hash_of((1,)), hash_of((1, 2))}


STEPS = st.lists(
    st.tuples(st.booleans(), st.lists(st.integers(1, 2), min_size=1, max_size=4).map(tuple)), max_size=60
)


@settings(deadline=None, max_examples=150)
@given(STEPS, st.integers(1, 5), st.integers(1, 5))
def test_it_tells_of_what_can_be_reached(steps: list[tuple[bool, Path]], every: int, batch: int) -> None:
    """vLLM's rules: a block is stored when its parent is there; any copy may go at any time."""
    mirror, reader = Mirror(SIZE, "m", "r"), Reader()
    copies: dict[Path, int] = {}
    events: list[KVEvent] = []
    for number, (stores, path) in enumerate(steps):
        if stores and (len(path) == 1 or copies.get(path[:-1])):
            copies[path] = copies.get(path, 0) + 1
            events.append(stored(path))
        elif not stores and copies.get(path):
            copies[path] -= 1
            events.append(BlockRemoved([name_of(path)], "GPU"))
        if number % batch == 0:
            mirror.take(KVEventBatch(0.0, events))
            events = []
        if number % every == 0:
            reader.read(mirror.take_events())
    mirror.take(KVEventBatch(0.0, events))
    reader.read(mirror.take_events())
    found = {path for path in copies if all(copies.get(path[:n], 0) for n in range(1, len(path) + 1))}
    assert reader.known == {hash_of(path) for path in found}
    assert mirror.num_blocks == len(found)
    for path in copies:
        tokens = [token for token in path for _ in range(SIZE)]
        assert mirror.holds(tokens, "") == (path in found)
    fresh = Reader()
    fresh.read(mirror.snapshot())
    assert fresh.known == reader.known


def test_cleared() -> None:
    mirror = fed(stored((1,)), AllBlocksCleared())
    assert mirror.take_events() == [AllBlocksCleared()] and mirror.snapshot() == []
