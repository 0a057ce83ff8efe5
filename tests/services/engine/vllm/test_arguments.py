"""Which setting is which of vLLM's arguments."""

from __future__ import annotations

from typing import Any

import pytest

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.sources import load_settings
from microserve.protocol.settings.vllm import OURS
from microserve.services.engine.room import MAX_HOST_POOL_NBYTES, Room
from microserve.services.engine.vllm.arguments import MIN_KV_NBYTES, arguments_of, require_known

GIB = 1 << 30
ROOM = Room(16 * GIB, 24 * GIB, "this machine")


def arguments(*overrides: str, room: Room | None = ROOM) -> dict[str, Any]:
    return arguments_of(load_settings(overrides=["kvcache.block_size=32", *overrides]), room)


def test_settings_are_arguments() -> None:
    found = arguments(
        "model.path=/m",
        "model.name=m",
        "model.dtype=float32",
        "model.load_format=random",
        "engine.max_num_seqs=7",
    )
    assert (found["model"], found["tokenizer"], found["served_model_name"]) == ("/m", "/m", "m")
    assert (found["dtype"], found["load_format"], found["max_num_seqs"]) == ("float32", "dummy", 7)
    assert found["block_size"] == 32
    assert "max_model_len" not in found  # the model's own
    assert arguments("engine.max_model_len=99")["max_model_len"] == 99


def test_every_argument_of_ours_can_be_given_by_its_setting_only() -> None:
    found = arguments("vllm.kv_cache_mb=1", "engine.max_model_len=9")
    free = {"scheduling_policy", "disable_log_stats"}  # of ours, unless somebody says another
    assert found.keys() - free <= OURS.keys()
    others = arguments("vllm.arguments={scheduling_policy = 'fcfs', seed = 3}")
    assert (others["scheduling_policy"], others["seed"]) == ("fcfs", 3)


def test_a_kv_cache_of_no_size_is_a_part_of_the_memory_that_is_left() -> None:
    two, four = (arguments(f"mesh.engines={n}")["kv_cache_memory_bytes"] for n in (2, 4))
    assert 1 * GIB < two < 2 * GIB and two == pytest.approx(2 * four, abs=2)
    huge, none = Room(1 << 42, 1 << 43, ""), Room(0, GIB, "")
    assert arguments(room=huge)["kv_cache_memory_bytes"] == MAX_HOST_POOL_NBYTES
    assert arguments(room=none)["kv_cache_memory_bytes"] == MIN_KV_NBYTES
    assert arguments("vllm.kv_cache_mb=3")["kv_cache_memory_bytes"] == 3 << 20
    assert "kv_cache_memory_bytes" not in arguments("engine.device=cuda:0", room=None)


def test_blocks_that_vllm_cannot_have_on_a_cpu_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"kvcache\.block_size must be a multiple of 32 .* is 16"):
        arguments("kvcache.block_size=16")
    assert arguments("kvcache.block_size=16", "engine.device=cuda:0")["block_size"] == 16


def test_an_argument_that_vllm_does_not_know_is_named_with_the_one_that_was_meant() -> None:
    require_known({"seed": 1}, {"seed"})
    with pytest.raises(ConfigError) as raised:
        require_known({"tensor_paralel_size": 2}, {"seed", "tensor_parallel_size"})
    assert raised.value.field == "vllm.arguments.tensor_paralel_size"
    assert "did you mean tensor_parallel_size?" in raised.value.detail
