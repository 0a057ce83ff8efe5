"""The door of the native step: what does not fit is refused in words, what ends a step leaves nothing behind,
and steps of several engines share nothing. In one process: memory that was corrupted would end it."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from microserve.kernels.cpu.library import library
from microserve.kernels.cpu.packing import array_of
from microserve.kernels.cpu.step import CpuStep
from microserve.kernels.cpu.weights import PackedWeights
from tests.support.kernels.family import BLOCK_SIZE, FAMILIES, NUM_BLOCKS, VOCAB, TinyModel, random_ids
from tests.support.kernels.family_step import Part, Room, variants

RECIPE, ELEM = "cpu2", "bfloat16"
FASTEST = variants(ELEM, RECIPE)[-1]
TABLE = list(range(NUM_BLOCKS))
PACKED = {
    "bfloat16": {
        "llama": "6fad7993712da69c",
        "mistral": "d46871230d9028a6",
        "qwen2": "86b024e5b3642d18",
        "qwen3": "fd7a34e775e297af",
        "smollm3": "d69e4f222948c143",
        "biased": "fb1747259aee4bad",
    },
    "float32": {
        "llama": "fe76f050502034dc",
        "mistral": "ab53dca8fca59f84",
        "qwen2": "539f8364c8717dd8",
        "qwen3": "e950b4650de2528b",
        "smollm3": "5eecb23b81ab2b84",
        "biased": "374103d0d47c1e12",
    },
    "bfloat16 int8": {
        "llama": "982a488d24c7d6c1",
        "mistral": "9dbb01313e0109de",
        "qwen2": "d06dcf6a61f29f6d",
        "qwen3": "9e23c81ab02b4849",
        "smollm3": "115db801f8aee2fa",
        "biased": "1a26308640a8b4eb",
    },
    "float32 int8": {
        "llama": "52d4e63aadabcfdf",
        "mistral": "492eae9b09c82f5e",
        "qwen2": "e7018a67dd966341",
        "qwen3": "b56d9f486a571e59",
        "smollm3": "bdfb259bf7464275",
        "biased": "a81e74507fc95999",
    },
}
"""Digests of packed weights, of layout 1."""
IDS = random_ids(300)


@pytest.fixture(scope="module")
def model() -> TinyModel:
    return TinyModel("llama", ELEM, RECIPE)


@pytest.fixture
def room(model: TinyModel) -> Iterator[Room]:
    room = Room(model, FASTEST, threads=2, bounds={"max_rows": 48, "max_logits": 4, "max_context": 200})
    yield room
    room.close()


def step_of(room: Room, rows: int = 3, context: int = 3, **changed: Any) -> Callable[[], object]:
    """A step of one span, with something in it changed."""
    at = np.arange(context - rows, context)
    spans = changed.pop("spans", [(rows, context, TABLE)])
    arrays: dict[str, Any] = {"tokens": np.ones(rows, np.int64), "positions": at, "slots": at}
    arrays["logit_rows"] = np.array([rows - 1])
    arrays |= {name: np.array(value, np.int64) for name, value in changed.items()}
    return lambda: room.step.run(
        arrays["tokens"], arrays["positions"], arrays["slots"], spans, arrays["logit_rows"]
    )


CASES: list[tuple[str, Callable[[Room], Callable[[], object]]]] = [
    ("num_rows", lambda room: step_of(room, rows=49, context=49)),
    ("num_rows|num_spans", lambda room: step_of(room, rows=0, context=0, logit_rows=[], spans=[])),
    ("num_spans", lambda room: step_of(room, spans=[])),
    ("num_logits", lambda room: step_of(room, rows=8, context=8, logit_rows=range(5))),
    ("span_rows", lambda room: step_of(room, spans=[(4, 4, TABLE)])),
    ("span_rows|positions", lambda room: step_of(room, spans=[(2, 3, TABLE)])),
    ("span_rows", lambda room: step_of(room, spans=[(-1, 3, TABLE)])),
    ("span_contexts", lambda room: step_of(room, rows=1, context=201)),
    ("span_contexts|positions", lambda room: step_of(room, spans=[(3, 2, TABLE)])),
    ("do not hold", lambda room: step_of(room, spans=[(3, 3, [])])),
    ("do not hold", lambda room: step_of(room, rows=1, context=2_000_000_000)),
    ("tables", lambda room: step_of(room, spans=[(3, 3, [NUM_BLOCKS])])),
    ("tables", lambda room: step_of(room, spans=[(3, 3, [-1])])),
    ("positions", lambda room: step_of(room, positions=[0, 1, 3])),
    ("positions", lambda room: step_of(room, positions=[-1, 0, 1])),
    ("positions", lambda room: step_of(room, positions=[0, 1])),
    ("token", lambda room: step_of(room, tokens=[1, VOCAB, 1])),
    ("token", lambda room: step_of(room, tokens=[1, -1, 1])),
    ("token", lambda room: step_of(room, tokens=[1, (1 << 32) + 1, 1])),
    ("slots", lambda room: step_of(room, slots=[0, 1, NUM_BLOCKS * BLOCK_SIZE])),
    ("slots", lambda room: step_of(room, slots=[0, 1, -2])),
    ("slots", lambda room: step_of(room, slots=[0, 1])),
    ("logit_rows", lambda room: step_of(room, logit_rows=[3])),
    ("logit_rows", lambda room: step_of(room, logit_rows=[-1])),
]


@pytest.mark.parametrize(("told", "make"), CASES)
def test_a_batch_that_does_not_fit_is_refused_and_the_next_is_right(
    room: Room, told: str, make: Callable[[Room], Callable[[], object]]
) -> None:
    fits = [Part(IDS, 0, 40, TABLE)]
    before = room.run(fits)
    with pytest.raises(ValueError, match=told):
        make(room)()
    assert room.run(fits) == before


def test_all_that_there_is_room_for_is_taken(room: Room) -> None:
    full = [Part(IDS, 12 * n, 12 * n + 12, TABLE[20 * n :]) for n in range(4)]
    assert len(room.run(full)) == 4
    assert room.run([Part(IDS, 199, 200, TABLE)])[0] is not None


class Ended(Exception):
    pass


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_what_on_layer_raises_is_passed_on_and_the_next_step_is_right(model: TinyModel, threads: int) -> None:
    """Also steps without logits: a thread that is late out of one must not walk into the next."""
    room = Room(model, FASTEST, threads=threads)
    expected = room.run([Part(IDS, 0, 9, TABLE)])
    for number in range(20):
        layers: list[int] = []

        def end(layer: int, last: int = number % 2, layers: list[int] = layers) -> None:
            layers.append(layer)
            if layer == last:
                raise Ended

        with pytest.raises(Ended):
            room.run([Part(IDS, 0, 20, TABLE)], end)
        assert layers == list(range(number % 2 + 1))
        assert room.run([Part(IDS, 0, 9, TABLE)]) == expected
        room.run([Part(IDS, 0, 20, TABLE, wants_logits=False)])
        assert room.run([Part(IDS, 0, 9, TABLE)]) == expected
    room.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_a_step_that_is_not_layerwise_gives_signs_of_life_alone(threads: int) -> None:
    """None of a short one. The long one computes for a second before its last layer; what is raised then ends
    nothing, and comes at the end."""
    model = TinyModel("qwen3")
    room = Room(model, "portable", threads, bounds={"max_rows": 700})
    parts, rows = [Part(random_ids(700), 0, 700, list(range(44)))], [699]
    expected = room.logits(parts, rows)
    room.is_layerwise = False
    signs: list[int] = []
    assert room.logits([Part(IDS, 0, 2, [50])], [1], signs.append).shape == (1, VOCAB)
    assert signs == []
    assert room.logits(parts, rows, signs.append).tobytes() == expected.tobytes()
    assert signs[-1:] == [1]

    def end(layer: int) -> None:
        raise Ended

    with pytest.raises(Ended):
        room.logits(parts, rows, end)
    room.close()


def test_on_layer_sees_the_layers_kv_and_computes_with_its_own_denormals(room: Room) -> None:
    """The step's own threads treat them as zero; who is called from there must not."""
    part, seen = Part(IDS, 0, 17, TABLE), []

    def look(layer: int) -> None:
        at = torch.arange(17)
        written = room.pool[layer][at // BLOCK_SIZE, :, at % BLOCK_SIZE].float()
        unwritten = [later[0].float().isnan().all() for later in room.pool[layer + 1 :]]
        seen.append(
            (bool(written.isfinite().all()), all(unwritten), bool(np.float32(1e-40) * np.float32(0.5) > 0))
        )

    room.run([part], look)
    assert seen == [(True, True, True)] * 2


def test_a_closed_step_says_so(model: TinyModel) -> None:
    room = Room(model, FASTEST, threads=2)
    room.close()
    room.close()
    with pytest.raises(ValueError, match="closed"):
        room.run([Part(IDS, 0, 2, TABLE)])


@pytest.mark.parametrize(
    ("told", "matrices", "vectors"),
    [
        ("q is", {"q": torch.zeros(72, 71)}, {}),
        ("down is", {"down": torch.zeros(44, 72)}, {}),
        ("without gate", {"gate": None}, {}),
        ("mlp_norm is", {}, {"mlp_norm": torch.ones(71)}),
        ("without attention_norm", {}, {"attention_norm": None}),
        ("biases of q alone", {}, {"q_bias": torch.zeros(72)}),
        ("k_norm is", {}, {"k_norm": torch.ones(9)}),
        ("gate_bias", {}, {"gate_bias": torch.ones(44)}),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    model: TinyModel, told: str, matrices: dict[str, Any], vectors: dict[str, Any]
) -> None:
    layer = model.layers[0]
    merged = [
        {name: tensor for name, tensor in {**given, **changed}.items() if tensor is not None}
        for given, changed in ((layer.matrices, matrices), (layer.vectors, vectors))
    ]
    changed = replace(layer, matrices=merged[0], vectors=merged[1])
    with pytest.raises(ValueError, match=told):
        model.packed(library(), layers=[model.layers[0], changed])


def test_a_pool_that_does_not_fit_is_refused(model: TinyModel, room: Room) -> None:
    weights, kv = model.packed(library()), array_of(room.pool[0])
    twice = np.concatenate([kv, kv], axis=4)[..., : kv.shape[4]]
    for wrong in (kv.astype(np.float32), kv[:-1], kv.swapaxes(1, 2), twice):
        with pytest.raises(ValueError, match="kv is"):
            CpuStep(library(), FASTEST, room.step.shape, 1, weights, [kv, wrong])
    with pytest.raises(ValueError, match="3 of the pool"):
        CpuStep(library(), FASTEST, room.step.shape, 1, weights, [kv] * 3)


def test_packed_weights_that_are_another_model_s_are_refused(model: TinyModel, room: Room) -> None:
    weights, pool = model.packed(library()), [array_of(kv) for kv in room.pool]
    first, second = weights.layers
    for told, wrong in (
        ("1 layers with weights", replace(weights, layers=(first,))),
        ("packed weights of", replace(weights, memory=weights.memory[:-4096])),
        ("packed weights of", replace(weights, has_head=True)),
        ("packed weights of", replace(weights, layers=(first, replace(second, vectors=())))),
        ("num_positions", replace(weights, num_positions=room.step.shape.max_context - 1)),
    ):
        with pytest.raises(ValueError, match=told):
            CpuStep(library(), FASTEST, room.step.shape, 1, wrong, pool)


def counted(model: TinyModel) -> PackedWeights:
    """Packed, with weights that no library has drawn."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return (torch.arange(tensor.numel()) % 251).to(tensor.dtype).reshape(tensor.shape)

    layers = [
        replace(
            layer,
            matrices={name: of(tensor) for name, tensor in layer.matrices.items()},
            vectors={name: of(tensor) for name, tensor in layer.vectors.items()},
        )
        for layer in model.layers
    ]
    names = ("embedding", "norm", "cos", "sin", *(["head"] if model.head is not None else []))
    return model.packed(library(), layers=layers, **{name: of(getattr(model, name)) for name in names})


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("family", FAMILIES)
def test_packed_bytes_are_those_of_their_layout_version(family: str, kind: str) -> None:
    """Files of them are kept from one version of this package to the next: whoever changes a byte counts
    ``kLayoutVersion`` on (native/pack.h), and writes the new digests here."""
    assert library().layout_version == 1
    elem, weights = [*kind.split(), "dtype"][:2]
    memory = counted(TinyModel(family, elem, weights=weights)).memory
    assert hashlib.sha256(memory.tobytes()).hexdigest()[:16] == PACKED[kind][family]


def test_a_model_that_does_not_fit_is_refused(model: TinyModel) -> None:
    for name, wrong in (
        ("embedding", model.embedding[1:]),
        ("norm", model.norm[1:]),
        ("sin", model.sin[1:]),
    ):
        with pytest.raises(ValueError, match=f"{name} is"):
            model.packed(library(), **{name: wrong})
    with pytest.raises(ValueError, match="1 layers"):
        model.packed(library(), layers=model.layers[:1])
    with pytest.raises(ValueError, match="window"):
        model.packed(library(), layers=[model.layers[0], replace(model.layers[1], window=0)])


@pytest.mark.parametrize(
    "changed", [{"num_kv_heads": 2}, {"num_heads": 99}, {"head_dim": 7}, {"hidden": 0}, {"elem": "float16"}]
)
def test_a_shape_that_is_none_is_refused(model: TinyModel, changed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"heads|a model of"):
        CpuStep(library(), FASTEST, replace(model.shape(), **changed), 1, model.packed(library()), [])


def test_steps_of_one_process_share_nothing(model: TinyModel) -> None:
    """Of two models, by turns and at once from two threads; one is closed while the other computes."""
    other = TinyModel("qwen3", "float32")
    rooms = [
        Room(model, FASTEST, threads=2),
        Room(other, variants("float32")[-1], threads=2),
        Room(model, FASTEST, threads=3),
    ]
    part = [Part(IDS, 0, 100, TABLE)]
    expected = [room.run(part) for room in rooms]
    assert expected[0] == expected[2] != expected[1]
    assert [room.run(part) for room in reversed(rooms)] == expected[::-1]

    found: list[list[Sequence[bytes | None]]] = [[], []]

    def repeat(number: int) -> None:
        for _ in range(6):
            found[number].append(rooms[number].run(part))

    threads = [threading.Thread(target=repeat, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    rooms[2].close()
    for thread in threads:
        thread.join()
    assert found == [[expected[0]] * 6, [expected[1]] * 6]
    for room in rooms:
        room.close()


def test_other_threads_run_python_during_a_step(model: TinyModel) -> None:
    """The step waits in ``on_layer`` for nothing: another thread's count must grow while it computes."""
    room = Room(model, "portable", threads=1)
    computing, count, counts = threading.Event(), [0], []
    done = threading.Event()

    def tick() -> None:
        computing.wait()
        while not done.is_set():
            count[0] += 1

    thread = threading.Thread(target=tick)
    thread.start()
    computing.set()
    for _ in range(2):
        room.run([Part(IDS, 0, 150, TABLE)], lambda layer: counts.append(count[0]))
    done.set()
    thread.join()
    # Between the two layers of a step nothing but C++ ran in this thread.
    assert sum(after > before for before, after in zip(counts[::2], counts[1::2], strict=True)) >= 1
    room.close()


def test_memory_does_not_grow(model: TinyModel) -> None:
    """Nor threads, over engines that come and go."""
    process = psutil.Process()

    def live(steps: int, threads: int = 1) -> None:
        room = Room(model, FASTEST, threads=threads)
        for number in range(steps):
            length = 1 + 97 * number % 300
            room.run([Part(IDS, 0, length, TABLE), Part(IDS, 150, 151, TABLE[40:])])
        room.close()

    live(200)
    live(1, threads=3)
    num_threads = process.num_threads()
    gc.collect()
    before = process.memory_info().rss
    live(2000)
    for _ in range(50):
        live(1, threads=3)
    gc.collect()
    assert process.num_threads() == num_threads
    assert process.memory_info().rss - before < 8 << 20
