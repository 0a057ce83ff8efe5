"""Which attention an engine on a GPU starts with, on CPU tensors with a stand-in for FlashInfer's kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from structlog.testing import capture_logs

from microserve.kernels.attention.paged_attention import Span
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, SampleSpec
from microserve.services.engine.model.attention.flashinfer import FlashInfer
from microserve.services.engine.model.attention.step import (
    DeviceAttention,
    MakeAttention,
    StepAttention,
    device_attention,
    device_batch,
)
from microserve.services.engine.model.attention_choice import (
    MakeWrapper,
    WrongResult,
    choose_attention,
    choose_kernels,
    try_out,
)
from microserve.services.engine.model.model import load_model
from microserve.services.engine.model.runner import ModelRunner
from microserve.services.engine.model.spec import ModelSpec
from tests.support.engine.device.flashinfer_stand_in import StandInWrapper
from tests.support.engine.model.tiny_model import FAMILIES, make_tiny_model

CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="m",
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=320,
    max_model_len=512,
    eos_token_ids=frozenset(),
    dtype="bfloat16",
    sliding_windows=frozenset({None, 4096}),
)


def stand_in() -> MakeWrapper:
    return StandInWrapper


def no_compiler() -> MakeWrapper:
    raise RuntimeError("Could not find nvcc\nand more lines")


def no_header() -> MakeWrapper:
    raise RuntimeError("Ninja build failed. Output:\n[1/11] nvcc\na.h:5:10: fatal error: curand_kernel.h")


class Unaligned(StandInWrapper):
    """Off by one in what ``window_left`` means."""

    def plan(self, *args: Any, window_left: int, **kwargs: Any) -> None:
        super().plan(*args, window_left=window_left + (window_left >= 0), **kwargs)


class Forgetful(StandInWrapper):
    """Leaves the output as it finds it."""

    def run(self, q: torch.Tensor, paged_kv_cache: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.zero_()


def make_by(kind: type[DeviceAttention]) -> MakeAttention:
    def make(spans: Sequence[Span], slots: npt.NDArray[np.int64], kv: torch.Tensor) -> StepAttention:
        return kind(device_batch(spans, kv.shape[2], CPU), torch.from_numpy(slots))

    return make


@pytest.mark.parametrize("wanted", ["auto", "flashinfer"])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "block_size"), [("bfloat16", 64, 16), ("float16", 128, 1), ("bfloat16", 256, 4)]
)
def test_flashinfer_is_taken_where_it_fits(wanted: str, dtype: str, head_dim: int, block_size: int) -> None:
    spec = replace(SPEC, dtype=dtype, head_dim=head_dim)
    with capture_logs() as events:
        make = choose_kernels(wanted, spec, block_size, CPU, {"flashinfer-fa2": stand_in})
    assert isinstance(make, FlashInfer)
    assert [(event["event"], event["attention"]) for event in events] == [
        (log.ATTENTION_CHOSEN, "flashinfer-fa2")
    ]


@pytest.mark.parametrize("wanted", ["auto", "flashinfer"])
def test_its_next_best_kernels_are_taken_where_the_best_fail(wanted: str) -> None:
    with capture_logs() as events:
        make = choose_kernels(wanted, SPEC, 16, CPU, {"fa3": no_header, "fa2": stand_in})
    assert isinstance(make, FlashInfer)
    failure, chosen = events
    assert (failure["event"], failure["kernel"], failure["instead"]) == (log.KERNEL_MISSING, "fa3", "fa2")
    assert failure["detail"] == "RuntimeError: a.h:5:10: fatal error: curand_kernel.h"
    assert (chosen["event"], chosen["attention"]) == (log.ATTENTION_CHOSEN, "fa2")


MISFITS: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"dtype": "float32"}, {"fa2": stand_in}, "model.dtype float32 is none of bfloat16, float16"),
    ({"head_dim": 80}, {"fa2": stand_in}, "head_dim 80 is none of 64, 128, 256"),
    ({}, {}, "FlashInfer is not installed"),
    ({}, {"fa3": no_header, "fa2": no_compiler}, "RuntimeError: Could not find nvcc"),
    ({}, {"fa2": lambda: Unaligned}, "WrongResult: off by"),
    ({}, {"fa2": lambda: Forgetful}, "WrongResult: off by"),
]


@pytest.mark.parametrize(("change", "loads", "why"), MISFITS)
def test_else_auto_takes_triton_and_says_why(change: dict[str, Any], loads: dict[str, Any], why: str) -> None:
    with capture_logs() as events:
        make = choose_kernels("auto", replace(SPEC, **change), 16, CPU, loads)
    assert make is device_attention
    *failures, chosen = events
    assert (chosen["event"], chosen["attention"]) == (log.ATTENTION_CHOSEN, "triton")
    assert chosen["why"].startswith(why)
    # What should have worked and did not is a warning of its own.
    failing = [name for name, load in loads.items() if load is not stand_in]
    assert [e["kernel"] for e in failures] == failing
    assert {(e["event"], e["log_level"]) for e in failures} <= {(log.KERNEL_MISSING, "warning")}


@pytest.mark.parametrize(("change", "loads", "why"), MISFITS)
def test_and_flashinfer_by_name_is_refused(change: dict[str, Any], loads: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError) as refused:
        choose_kernels("flashinfer", replace(SPEC, **change), 16, CPU, loads)
    assert refused.value.field == "engine.attention"
    assert f"'flashinfer' cannot be had: {why}" in refused.value.detail
    assert "\n" not in refused.value.detail


def test_triton_by_name_does_not_touch_flashinfer() -> None:
    with capture_logs() as events:
        assert choose_kernels("triton", SPEC, 16, CPU, {"fa2": no_compiler}) is device_attention
    assert [event["event"] for event in events] == [log.ATTENTION_CHOSEN]


def test_on_a_cpu_the_runner_chooses() -> None:
    with capture_logs() as events:
        assert choose_attention("auto", SPEC, 16, CPU) is None
    assert not events


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_first_step_is_also_one_that_triton_passes(dtype: str) -> None:
    try_out(device_attention, replace(SPEC, dtype=dtype), 16, CPU)


def test_a_first_step_that_was_not_written_is_noticed() -> None:
    class Unwritten(DeviceAttention):
        def write(self, kv: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
            pass

    with pytest.raises(WrongResult, match="off by nan"):
        try_out(make_by(Unwritten), SPEC, 16, CPU)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_windows_of_a_model_are_those_that_its_layers_ask_for(tmp_path: Path, family: str) -> None:
    model = load_model(make_tiny_model(tmp_path / family, family), dtype="float32")
    spec, asked = model.spec, set()

    class Watched(DeviceAttention):
        def attend(
            self, query: torch.Tensor, kv: torch.Tensor, *, scale: float, sliding_window: int | None
        ) -> torch.Tensor:
            asked.add(sliding_window)
            return super().attend(query, kv, scale=scale, sliding_window=sliding_window)

    row_nbytes = 2 * spec.num_kv_heads * spec.head_dim * 4
    region = np.zeros(spec.num_layers * 4 * 16 * row_nbytes, np.uint8)
    runner = ModelRunner(model, region, 4, 16, make_attention=make_by(Watched))
    sample = SampleSpec(SamplingParams(temperature=0.0, max_tokens=1), [1, 2, 3], [], frozenset())
    runner.execute(Batch([Chunk(1, [1, 2, 3], 0, [2], 0, sample)]))
    assert spec.sliding_windows == asked
