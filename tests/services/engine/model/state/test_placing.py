"""Which states a model's layers keep, and where: beside the KV of the layer that they travel with."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from microserve.protocol.errors import ConfigError, InternalError
from microserve.services.engine.core.batch import Batch, Chunk
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.spec import StateSpec
from microserve.services.engine.model.state.placing import state_of
from tests.support.engine.hybrid_mesh import tiny
from tests.support.engine.model.families import make_model
from tests.support.engine.model.random_batches import World

C, A = "conv", "full_attention"


def state(layers: list[str], **changed: Any) -> StateSpec | None:
    config = AutoConfig.for_model(
        "lfm2", layer_types=layers, num_hidden_layers=len(layers), hidden_size=10, **changed
    )
    return state_of(config, "bfloat16")


def test_a_state_goes_with_the_next_layer_that_keeps_kv_or_with_the_last() -> None:
    spec = state([C, C, A, C, A, C])
    assert spec is not None and spec.kv_layers == (2, 4)
    assert [(each.layer, each.kv_layer) for each in spec.layers] == [(0, 0), (1, 0), (3, 1), (5, 1)]
    tensors = [each.tensors[0] for each in spec.layers]
    assert [(each.begin, each.shape, each.nbytes) for each in tensors] == [
        (0, (10, 3), 60),
        (64, (10, 3), 60),
        (0, (10, 3), 60),
        (64, (10, 3), 60),
    ]
    assert spec.nbytes == 128


def test_layers_that_all_keep_kv_have_no_state() -> None:
    assert state([A, A]) is None


def test_a_delta_net_keeps_its_last_inputs_and_a_state_in_float32() -> None:
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    spec = state_of(config, "bfloat16")
    assert spec is not None and spec.kv_layers == (3,)
    conv, recurrent = spec.layers[0].tensors
    assert (conv.shape, conv.dtype) == ((2 * 16 * 128 + 32 * 128, 4), "bfloat16")
    assert (recurrent.shape, recurrent.dtype) == ((32, 128, 128), "float32")
    assert recurrent.begin == conv.nbytes and spec.nbytes == 3 * (conv.nbytes + recurrent.nbytes)


def test_a_model_none_of_whose_layers_keeps_kv_is_refused(tmp_path: Any) -> None:
    directory = make_model(tmp_path / "lfm2", "lfm2", layer_types=[C] * 4)
    with pytest.raises(ConfigError, match="none of its layers keeps KV"):
        load_model(directory, dtype="float32")


def test_a_chunk_that_goes_on_without_a_state_or_with_too_small_a_one_is_no_batch() -> None:
    world = World(tiny("lfm2")[0], None)
    assert world.layout.num_state_blocks == 2
    for states in ((None, [5, 6]), ([5], [5, 6]), ([5, 6], [5])):
        chunk = Chunk(1, [7], 4, [0, 1], 4, None, None, *states)
        with pytest.raises(InternalError, match="state"):
            world.runner.execute(Batch([chunk]))
