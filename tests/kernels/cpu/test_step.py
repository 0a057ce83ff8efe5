"""A row's bits, KV and logits, depend on that row and its own context alone: whatever the company, chunks,
the threads, the variant, where KV came from, and what stood in the pool before.

Against the class written again in numpy, and between ways of computing the same.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kernels.cpu.library import ELEMS
from tests.support.kernels.family import (
    BLOCK_SIZE,
    FAMILIES,
    NUM_BLOCKS,
    NUM_LAYERS,
    TinyModel,
    bytes_of,
    class_bytes,
    random_ids,
)
from tests.support.kernels.family_step import Part, Room, variants

CLASSES = [f"{recipe} {elem}" for recipe, elem in ELEMS]
LONGEST = 120
EDGES = (255, 256, 257, 511, 512, 513)
"""Where segments of attention end."""
POOL = [int(block) for block in np.random.default_rng(11).permutation(NUM_BLOCKS)]


def new_model(family: str, kind: str) -> TinyModel:
    recipe, elem = kind.split()
    return TinyModel(family, elem, recipe)


model_of = functools.cache(new_model)


def variants_of(kind: str) -> list[str]:
    recipe, elem = kind.split()
    return variants(elem, recipe)


def fastest(kind: str) -> str:
    return variants_of(kind)[-1]


def tables(*lengths: int) -> list[list[int]]:
    """Of sequences of these lengths: scattered blocks of the pool, none twice."""
    free = iter(POOL)
    return [[next(free) for _ in range(-(-length // BLOCK_SIZE))] for length in lengths]


def chunked(ids: Sequence[int], table: Sequence[int], cuts: Sequence[int]) -> list[Part]:
    edges = [0, *sorted(cuts), len(ids)]
    return [Part(ids, a, b, table) for a, b in itertools.pairwise(edges) if a < b]


@functools.cache
def one_by_one(family: str, kind: str, length: int, seed: int) -> tuple[list[bytes | None], bytes]:
    """Token by token, alone, by one thread: bits of the logits behind each position, and of all KV."""
    room = Room(model_of(family, kind), fastest(kind))
    ids, (table,) = random_ids(length, seed), tables(length)
    logits = [room.run([Part(ids, at, at + 1, table)])[0] for at in range(length)]
    kv = room.stored(table, length)
    room.close()
    return logits, kv


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_all_variants_compute_what_the_class_says(family: str, kind: str) -> None:
    model, ids, (table,) = model_of(family, kind), random_ids(38), tables(38)
    kv, logits = model.sequence(ids, range(38))
    for variant in variants_of(kind):
        for cuts in ([], [17], range(38)):
            room = Room(model, variant)
            parts = chunked(ids, table, cuts)
            got = [room.run([part])[0] for part in parts]
            assert got == [bytes_of(logits[part.end - 1]) for part in parts], (variant, cuts)
            assert room.stored(table, 38) == class_bytes(kv, 38), (variant, cuts)
            room.close()


@pytest.mark.parametrize("kind", ["cpu1 bfloat16", "cpu2 bfloat16"])
def test_segments_are_those_of_the_class(kind: str) -> None:
    """Several of them, in layers with and without a window that leaves the first ones out."""
    model, ids, (table,) = model_of("qwen2", kind), random_ids(530), tables(530)
    wanted = [255, 256, 400, 529]
    kv, logits = model.sequence(ids, wanted)
    room = Room(model, fastest(kind))
    room.run([Part(ids, 0, 255, table)])
    for at, row in zip(wanted, logits, strict=True):
        if at - 1 > 256:
            room.run([Part(ids, 257 if at == 400 else 401, at, table, wants_logits=False)])
        assert room.run([Part(ids, at, at + 1, table)]) == [bytes_of(row)]
    assert room.stored(table, 530) == class_bytes(kv, 530)
    room.close()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_decoded_kv_is_prefilled_kv_at_every_border_of_a_segment(family: str, kind: str) -> None:
    length = max(EDGES) + 1
    logits, kv = one_by_one(family, kind, length, 0)
    ids, (table,) = random_ids(length), tables(length)
    for cuts in ([], EDGES, [1, 2, 9, 16, 100, 101, 357], range(64, length, 64)):
        room = Room(model_of(family, kind), fastest(kind), poison="infinity", bounds={"max_rows": 640})
        for part in chunked(ids, table, cuts):
            assert room.run([part]) == [logits[part.end - 1]]
        assert room.stored(table, length) == kv
        room.close()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("variant", "kind"), [(v, kind) for kind in CLASSES if "bf" in kind for v in variants_of(kind)]
)
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_variants_and_threads_give_the_same_bits(family: str, variant: str, kind: str, threads: int) -> None:
    length = 40 if variant == "portable" else 270
    logits, kv = one_by_one(family, kind, length, 1)
    ids, (table,) = random_ids(length, 1), tables(length)
    room = Room(model_of(family, kind), variant, threads=threads)
    for part in chunked(ids, table, [length - 9, length - 1]):
        assert room.run([part]) == [logits[part.end - 1]]
    assert room.stored(table, length) == kv
    room.close()


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_schedule_gives_the_bits_of_one_row_at_a_time(family: str, data: st.DataObject) -> None:
    """Sequences go on by any numbers of rows, in any company and order, until each is done; what was there
    before is poison."""
    kind = data.draw(st.sampled_from(CLASSES), "class")
    model = model_of(family, kind)
    room = Room(
        model,
        fastest(kind),
        data.draw(st.integers(1, 2), "threads"),
        data.draw(st.sampled_from(["nan", "infinity"])),
    )
    lengths = data.draw(st.lists(st.integers(1, LONGEST), min_size=1, max_size=9), "lengths")
    own = tables(*lengths)
    done = dict.fromkeys(range(len(lengths)), 0)
    prompts = [random_ids(LONGEST, number) for number in range(len(lengths))]
    while remaining := [number for number, at in done.items() if at < lengths[number]]:
        chosen = data.draw(st.permutations(remaining))[: data.draw(st.integers(1, len(remaining)))]
        parts = []
        for number in chosen:
            at = done[number]
            rows = data.draw(st.one_of(st.just(1), st.integers(1, lengths[number] - at)))
            rows = min(rows, lengths[number] - at)
            parts.append(Part(prompts[number], at, at + rows, own[number]))
            done[number] = at + rows
        got = room.run(parts)
        for number, part, bits in zip(chosen, parts, got, strict=True):
            assert bits == one_by_one(family, kind, LONGEST, number)[0][part.end - 1]
    for number, length in enumerate(lengths):
        kv = one_by_one(family, kind, LONGEST, number)[1]
        assert room.stored(own[number], length) == kv_of(kv, LONGEST, length)
    room.close()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", FAMILIES)
def test_kv_that_came_from_another_pool_is_as_good_as_ones_own(family: str, kind: str) -> None:
    """Copied by blocks, read where a prefix is shared, and not written again: slots of -1."""
    model, length, split = model_of(family, kind), 300, 272
    logits, kv = one_by_one(family, kind, length, 2)
    ids, (here, there) = random_ids(length, 2), tables(length, length)
    sender = Room(model, variants_of(kind)[1 % len(variants_of(kind))], threads=2)
    sender.run([Part(ids, 0, split, there, wants_logits=False)])
    for end in (split, split - 1, split - 16):
        room = Room(model, fastest(kind), poison="infinity")
        blocks = -(-end // BLOCK_SIZE)
        for to, of in zip(room.pool, sender.pool, strict=True):
            to[here[:blocks]] = of[there[:blocks]]
        before = room.stored(here, end)
        # The last rows of the prefix are computed once more, as for a prompt that is wholly cached.
        assert room.run([Part(ids, end - 3, length, here, write_from=end)]) == [logits[-1]]
        assert room.stored(here, end) == before == kv_of(kv, length, end)
        assert room.stored(here, length) == kv
        room.close()
    sender.close()


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "biased"])
def test_logits_do_not_depend_on_which_others_are_wanted(family: str, kind: str) -> None:
    """The last layer is computed of those rows alone: some of a chunk, none of another, in any order."""
    model, own = model_of(family, kind), tables(270, 40, 30)
    before = [Part(random_ids(270, 0), 0, 269, own[0]), Part(random_ids(40, 1), 0, 3, own[1])]
    parts = [
        *(Part(random_ids(270, 0), 269, 270, own[0]), Part(random_ids(40, 1), 3, 40, own[1])),
        Part(random_ids(30, 2), 0, 30, own[2]),
    ]
    rooms = [Room(model, variant, 2, bounds={"max_logits": 68}) for variant in variants_of(kind)[-2:]]
    logits, pools = [], set()
    for room in rooms:
        room.logits(before, [])
        logits.append(room.logits(parts, range(68)))
        pools.add(tuple(room.whole_pool()))
    for room in rooms:
        for wanted in ([67], [0, 37, 67], [*range(1, 30, 3)], [38, 39], [5, 3, 60], [4, 4], []):
            room.logits(before, [])
            assert room.logits(parts, wanted).tobytes() == logits[0][wanted].tobytes(), wanted
            pools.add(tuple(room.whole_pool()))
        room.close()
    assert len(pools) == 1 and all(each.tobytes() == logits[0].tobytes() for each in logits)


def kv_of(kv: bytes, length: int, end: int) -> bytes:
    layers = np.frombuffer(kv, np.float32).reshape(NUM_LAYERS, length, -1)
    return b"".join(bytes_of(layer[:end]) for layer in layers)


@pytest.mark.parametrize("kind", CLASSES)
def test_rows_that_overflow_do_not_reach_those_beside_them(kind: str) -> None:
    """A sequence whose logits are no numbers: others of its step, and its own earlier rows, are as ever."""
    model = new_model("llama", kind)
    broken = model.embedding.clone()
    broken[7] = float("nan")
    model.embedding = broken  # tied: logits of token 7 are NaN everywhere, and all of rows that read it
    ids = [token if token != 7 else 8 for token in random_ids(60, 3)]
    good, bad = tables(60, 60)
    room = Room(model, fastest(kind), threads=2)
    alone = room.run([Part(ids, 0, 60, good)])
    kv = room.stored(good, 60)
    room.close()

    room = Room(model, fastest(kind), threads=2)
    hurt = [*ids[:40], 7, *ids[41:]]
    parts = [Part(hurt, 0, 60, bad), Part(ids, 0, 60, good)]
    got = room.run(parts)
    assert got[0] != got[1] == alone[0]
    assert room.stored(good, 60) == kv
    # Rows before the broken one, in the same chunk.
    assert room.stored(bad, 40) == room.stored(good, 40)
    assert np.isnan(np.frombuffer(got[0] or b"", np.float32)).any()
    room.close()
