"""Prefix index: any interleaving of many engines' events equals a model, with blocks in C++ and in Python."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from microserve.kvcache.prefix.extension import extension
from microserve.kvcache.prefix.hash import block_hashes, root_hash
from microserve.kvcache.prefix.index import MIN_MAX_NBYTES, PrefixIndex
from microserve.kvcache.prefix.python_blocks import PythonBlocks
from microserve.protocol.errors import ConfigError, InternalError, InvalidRequest
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEvent,
    KVEventBatch,
    WireHash,
    encode_batch,
)
from tests.support.examples import examples
from tests.support.kvcache.prefix_indexes import FORMS, new_index

BLOCK_SIZE = 2
MODEL = "model"
LARGE = 1 << 30

Prefix = tuple[str, tuple[int, ...]]
"""Salt and every token up to the end of a block."""


def our_name(prefix: Prefix) -> bytes:
    salt, tokens = prefix
    return block_hashes(tokens, BLOCK_SIZE, root_hash(MODEL, salt=salt))[-1]


def foreign_digest(prefix: Prefix) -> bytes:
    return sha256(repr(prefix).encode()).digest()


NAMING: dict[str, Callable[[Prefix], WireHash]] = {
    "ours-1": our_name,
    "ours-2": our_name,
    "ints": lambda prefix: int.from_bytes(foreign_digest(prefix)[:8], "big"),
    "negative-ints": lambda prefix: int.from_bytes(foreign_digest(prefix)[:8], "big", signed=True),
    "digests": foreign_digest,
    "digests-as-wide-as-ours": lambda prefix: foreign_digest(prefix)[:16],
}
ENGINES = st.sampled_from(sorted(NAMING))
# Every block is two equal tokens, so prefixes meet often.
PREFIXES = st.tuples(
    st.sampled_from(["", "tenant"]),
    st.lists(st.integers(0, 1), min_size=1, max_size=4).map(
        lambda bits: tuple(bit for bit in bits for _ in range(BLOCK_SIZE))
    ),
)


def parents(prefix: Prefix) -> list[Prefix]:
    """The prefix and all before it, shortest first."""
    salt, tokens = prefix
    return [(salt, tokens[:end]) for end in range(BLOCK_SIZE, len(tokens) + 1, BLOCK_SIZE)]


def stored(engine: str, run: list[Prefix]) -> BlockStored:
    """The event for consecutive blocks, the last of which ends the last prefix."""
    name = NAMING[engine]
    salt, tokens = run[-1]
    begin = len(run[0][1]) - BLOCK_SIZE
    return BlockStored(
        [name(prefix) for prefix in run],
        name((salt, tokens[:begin])) if begin else None,
        list(tokens[begin:]),
        BLOCK_SIZE,
        extra_keys=[(salt,), *[None] * (len(run) - 1)] if salt and not begin else None,
    )


class IndexAgainstModel(RuleBasedStateMachine):
    """``self.held`` is the model: for each engine the set of prefixes whose last block it holds. Both forms
    are told the same."""

    def __init__(self) -> None:
        super().__init__()
        forms = FORMS if extension() is not None else ("python",)
        self.indexes = [new_index(form, BLOCK_SIZE, MODEL, LARGE) for form in forms]
        self.held: dict[str, set[Prefix]] = {}

    def send(self, engine: str, *events: KVEvent) -> None:
        """As they would come over the wire."""
        payload = encode_batch(KVEventBatch(0.0, list(events)))
        for index in self.indexes:
            index.apply(engine, decode_batch(payload).events)

    def store_in_model(self, engine: str, run: list[Prefix]) -> None:
        held = self.held.setdefault(engine, set())
        before = (run[0][0], run[0][1][:-BLOCK_SIZE])
        # A foreign block can be placed only where its parent is known.
        if engine.startswith("ours") or not before[1] or before in held:
            held.update(run)

    @rule(engine=ENGINES, prefix=PREFIXES, data=st.data())
    def store(self, engine: str, prefix: Prefix, data: st.DataObject) -> None:
        chain = parents(prefix)
        run = chain[data.draw(st.integers(0, len(chain) - 1)) :]
        self.send(engine, stored(engine, run))
        self.store_in_model(engine, run)

    @rule(engine=ENGINES, prefixes=st.lists(PREFIXES, max_size=4))
    def remove(self, engine: str, prefixes: list[Prefix]) -> None:
        self.send(engine, BlockRemoved([NAMING[engine](prefix) for prefix in prefixes]))
        self.held.setdefault(engine, set()).difference_update(prefixes)

    @rule(engine=ENGINES)
    def clear(self, engine: str) -> None:
        self.send(engine, AllBlocksCleared())
        self.held[engine] = set()

    @rule(engine=ENGINES, prefixes=st.lists(PREFIXES, max_size=4))
    def replace(self, engine: str, prefixes: list[Prefix]) -> None:
        for index in self.indexes:
            index.replace(engine, [stored(engine, parents(prefix)) for prefix in prefixes])
        self.held[engine] = {parent for prefix in prefixes for parent in parents(prefix)}

    @rule(engine=ENGINES)
    def remove_engine(self, engine: str) -> None:
        for index in self.indexes:
            index.remove_engine(engine)
        self.held.pop(engine, None)

    @rule()
    def age(self) -> None:
        """As when there is too much, but with room for both generations: nothing may be seen of it."""
        for index in self.indexes:
            if not next(iter(index._blocks.generations()[1]), None):
                index._blocks.age()
                index._has_old = True

    @rule(prefix=PREFIXES, more=st.lists(st.integers(0, 1), max_size=3), by_hashes=st.booleans())
    def lookup(self, prefix: Prefix, more: list[int], by_hashes: bool) -> None:
        salt, tokens = prefix[0], [*prefix[1], *more]
        expected = {}
        for engine, held in self.held.items():
            num_tokens = 0
            while num_tokens < len(tokens) and (salt, tuple(tokens[: num_tokens + BLOCK_SIZE])) in held:
                num_tokens += BLOCK_SIZE
            if num_tokens:
                expected[engine] = num_tokens
        hashes = block_hashes(tokens, BLOCK_SIZE, root_hash(MODEL, salt=salt))
        found = [
            index.lookup_hashes(hashes) if by_hashes else index.lookup(tokens, salt) for index in self.indexes
        ]
        assert all(each == expected for each in found)
        # Strategies may take the first of equals.
        assert all(list(each) == list(found[0]) for each in found)

    @invariant()
    def agrees(self) -> None:
        for index in self.indexes:
            index.check_integrity()
            assert index.num_engines == len(self.held)
            assert index.num_blocks == len(set().union(*self.held.values()))
            counters = index.counters
            assert (counters.evicted_blocks, counters.ignored_blocks, counters.malformed_blocks) == (0, 0, 0)


IndexAgainstModel.TestCase.settings = settings(
    max_examples=examples(100), stateful_step_count=40, deadline=None
)
TestIndexAgainstModel = IndexAgainstModel.TestCase


def store_all(tokens: list[int]) -> BlockStored:
    return BlockStored([*block_hashes(tokens, BLOCK_SIZE, root_hash(MODEL))], None, tokens, BLOCK_SIZE)


# --- what events say ---------------------------------------------------------------------------------


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def index(form: str) -> PrefixIndex:
    return new_index(form, BLOCK_SIZE, MODEL, LARGE)


def test_matches_end_where_each_engine_ends(index: PrefixIndex) -> None:
    tokens = list(range(400))
    for i in range(200):
        index.apply(f"engine-{i:02}", [store_all(tokens[: 2 * (i + 1)])])
    assert index.lookup(tokens) == {f"engine-{i:02}": 2 * (i + 1) for i in range(200)}
    index.check_integrity()
    for i in range(0, 200, 2):
        index.remove_engine(f"engine-{i:02}")
    assert index.lookup(tokens) == {f"engine-{i:02}": 2 * (i + 1) for i in range(1, 200, 2)}
    assert index.lookup([9, *tokens]) == {}


def test_a_gap_ends_the_match(index: PrefixIndex) -> None:
    event = store_all([1, 2, 3, 4, 5, 6])
    index.apply("engine", [event, BlockRemoved([event.block_hashes[1]])])
    assert index.lookup([1, 2, 3, 4, 5, 6]) == {"engine": 2}


def test_stored_twice_and_removed_once_is_removed(index: PrefixIndex) -> None:
    event = store_all([1, 2])
    index.apply("engine", [event, event, BlockRemoved(event.block_hashes)])
    assert index.lookup([1, 2]) == {}


@pytest.mark.parametrize(
    "fields",
    [
        {"block_size": 4},
        {"medium": "CPU"},
        {"group_idx": 1},
        {"lora_id": 3},
        {"extra_keys": [(("image", 0),)]},
        {"extra_keys": [("salt", "image")]},
    ],
)
def test_what_is_no_plain_prefix_on_the_device_is_ignored(
    index: PrefixIndex, fields: dict[str, object]
) -> None:
    event = BlockStored([1], None, [1, 2], BLOCK_SIZE)
    for name, value in fields.items():
        setattr(event, name, value)
    index.apply("engine", [event])
    assert index.num_blocks == 0
    assert index.counters.ignored_blocks == 1


def test_images_end_what_can_be_placed(index: PrefixIndex) -> None:
    tokens = [1, 2, 3, 4, 5, 6]
    index.apply(
        "engine", [BlockStored([1, 2, 3], None, tokens, BLOCK_SIZE, extra_keys=[None, ("image",), None])]
    )
    assert index.lookup(tokens) == {"engine": 2}
    assert index.counters.ignored_blocks == 2
    index.apply("engine", [BlockStored([4], 3, [7, 8], BLOCK_SIZE)])
    assert index.counters.orphaned_blocks == 1


def test_removal_from_another_tier_keeps_the_device_block(index: PrefixIndex) -> None:
    event = store_all([1, 2])
    index.apply("engine", [event, BlockRemoved(event.block_hashes, "CPU")])
    index.apply("engine", [BlockRemoved(event.block_hashes, group_idx=1)])
    assert index.lookup([1, 2]) == {"engine": 2}
    index.apply("engine", [BlockRemoved(event.block_hashes, "GPU")])
    assert index.lookup([1, 2]) == {}


def test_adapters_are_prefixes_of_their_own(index: PrefixIndex) -> None:
    event = BlockStored([7], None, [1, 2], BLOCK_SIZE, 1, "GPU", "lora", [("lora", "salt")])
    index.apply("engine", [event])
    assert index.lookup([1, 2], "salt", adapter="lora") == {"engine": 2}
    assert index.lookup([1, 2], "salt") == index.lookup([1, 2], adapter="lora") == index.lookup([1, 2]) == {}


def test_a_name_given_to_another_block_leaves_the_first(index: PrefixIndex) -> None:
    index.apply("engine", [BlockStored([7], None, [1, 2], BLOCK_SIZE)])
    index.apply("engine", [BlockStored([7], None, [3, 4], BLOCK_SIZE)])
    assert (index.lookup([1, 2]), index.lookup([3, 4])) == ({}, {"engine": 2})
    index.apply("engine", [BlockStored([8, 8], None, [5, 6, 7, 8], BLOCK_SIZE)])
    assert index.num_blocks == 2
    index.apply("engine", [BlockRemoved([7, 8])])
    assert index.num_blocks == 0


def test_one_name_means_different_blocks_on_different_engines(index: PrefixIndex) -> None:
    index.apply("a", [BlockStored([7], None, [1, 2], BLOCK_SIZE)])
    index.apply("b", [BlockStored([7], None, [3, 4], BLOCK_SIZE)])
    index.apply("b", [BlockRemoved([7])])
    assert index.lookup([1, 2]) == {"a": 2}


def test_an_engine_may_come_back_as_another_kind(index: PrefixIndex) -> None:
    index.apply("engine", [store_all([1, 2])])
    index.replace("engine", [BlockStored([7], None, [3, 4], BLOCK_SIZE)])
    assert (index.lookup([1, 2]), index.lookup([3, 4])) == ({}, {"engine": 2})
    index.replace("engine", [store_all([5, 6])])
    assert index.num_blocks == 1
    index.check_integrity()


def test_events_that_contradict_themselves_are_counted(index: PrefixIndex) -> None:
    index.apply("foreign", [BlockStored([1, 2], None, [1, 2, 3], BLOCK_SIZE)])
    index.apply("ours", [store_all([1, 2]), BlockStored([7, b"short"], None, [1, 2, 3, 4], BLOCK_SIZE)])
    index.apply("ours", [BlockRemoved([7, b"short"])])
    assert index.counters.malformed_blocks == 4
    assert index.num_blocks == 1


WIRE_NAMES = st.integers(0, 3) | st.sampled_from([b"", bytes(16), bytes(32), *map(bytes, [[1] * 16])])
WILD_EVENTS: st.SearchStrategy[KVEvent] = st.one_of(
    st.builds(
        BlockStored,
        st.lists(WIRE_NAMES, max_size=3),
        st.none() | WIRE_NAMES,
        st.lists(st.integers(0, 1), max_size=6),
        st.sampled_from([BLOCK_SIZE, 0, 4]),
        lora_name=st.sampled_from([None, "lora"]),
        extra_keys=st.none() | st.lists(st.none() | st.tuples(st.sampled_from(["lora", "s", 1])), max_size=3),
    ),
    st.builds(BlockRemoved, st.lists(WIRE_NAMES, max_size=3)),
    st.just(AllBlocksCleared()),
)


@pytest.mark.parametrize("form", FORMS)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.lists(WILD_EVENTS, max_size=4)), max_size=8))
def test_no_event_breaks_the_index(form: str, batches: list[tuple[str, list[KVEvent]]]) -> None:
    index = new_index(form, BLOCK_SIZE, MODEL, MIN_MAX_NBYTES)
    for engine, events in batches:
        index.apply(engine, events)
        index.check_integrity()
    for engine in ("a", "b"):
        index.remove_engine(engine)
    assert index.num_blocks == 0


# --- arguments ---------------------------------------------------------------------------------------


def test_bad_arguments_are_named(index: PrefixIndex) -> None:
    with pytest.raises(ConfigError) as caught:
        PrefixIndex(0, MODEL, LARGE)
    assert caught.value.field == "block_size"
    with pytest.raises(ConfigError) as caught:
        PrefixIndex(BLOCK_SIZE, MODEL, MIN_MAX_NBYTES - 1)
    assert caught.value.field == "max_nbytes"
    for wrong in (-1, 2**32, 2**64, "1", 1.0):
        with pytest.raises(InvalidRequest) as refused:
            index.lookup([wrong, 2])  # type: ignore[list-item]
        assert refused.value.field == "tokens"
    index.remove_engine("unknown")


def test_tokens_may_be_any_sequence_of_whole_numbers(index: PrefixIndex) -> None:
    index.apply("engine", [store_all([1, 2, 3, 4])])
    for tokens in ((1, 2, 3, 4), range(1, 5), [np.int64(1), np.uint32(2), 3, 4], [True, 2, 3, 4]):
        assert index.lookup(tokens) == {"engine": 4}  # type: ignore[arg-type]


def test_check_integrity_sees_damage() -> None:
    index = new_index("python", BLOCK_SIZE, MODEL, LARGE)
    blocks = index._blocks
    assert isinstance(blocks, PythonBlocks)
    index.apply("engine", [store_all([1, 2])])
    (key,) = blocks._young
    index.check_integrity()
    for damaged in ({key: 0}, {key: 2}, {b"short": 1}):
        blocks._young = damaged
        with pytest.raises(InternalError):
            index.check_integrity()
    blocks._young = {key: 1}
    blocks._old = {key: 1}
    with pytest.raises(InternalError, match="both generations"):
        index.check_integrity()
    blocks._old = {}
    index._foreign_nbytes = 1
    with pytest.raises(InternalError, match="foreign"):
        index.check_integrity()
    index._foreign_nbytes = 0
    index.max_nbytes = 1
    with pytest.raises(InternalError, match="limit 1"):
        index.check_integrity()
