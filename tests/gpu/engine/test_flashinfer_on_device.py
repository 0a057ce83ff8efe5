"""FlashInfer on a GPU against the oracle, as the engine uses it: step after step in one stream.

Bounds are those of the Triton kernels: outputs of values around 1 are off by at most ``BOUNDS``.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from structlog.testing import capture_logs

from microserve.kernels.attention.paged_attention import Span
from microserve.protocol import log
from microserve.services.engine.model.attention.flashinfer import FlashInfer, load_flashinfer
from microserve.services.engine.model.attention.step import device_attention
from microserve.services.engine.model.attention_choice import choose_attention
from microserve.services.engine.model.spec import ModelSpec
from tests.support.engine.device.kernel_cases import AttentionCase

BOUNDS = {torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.fixture(scope="module")
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is False")
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="module")
def flashinfer() -> None:
    pytest.importorskip("flashinfer", reason="FlashInfer is not installed")


def spec_of(head_dim: int, dtype: str, windows: frozenset[int | None]) -> ModelSpec:
    return ModelSpec(
        name="m",
        num_layers=2,
        num_heads=8,
        num_kv_heads=2,
        head_dim=head_dim,
        vocab_size=320,
        max_model_len=4096,
        eos_token_ids=frozenset(),
        dtype=dtype,
        sliding_windows=windows,
    )


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.usefixtures("flashinfer")
def test_step_after_step_equals_the_oracle(
    device: torch.device, backend: str, dtype: torch.dtype, head_dim: int, share: int
) -> None:
    """Decodes beside chunks; two kinds of layers; pools whose free rows are NaN."""
    if backend == "fa3" and torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("fa3 is for sm_90 alone")
    make = FlashInfer(load_flashinfer(device, 2 * share, 2, head_dim, backend))
    scale, bound, chance = head_dim**-0.5, BOUNDS[dtype], random.Random(head_dim + share)
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    for step in range(3):
        prefills = [(100, 190), (33, 33), (chance.randint(2, 60), 700)][step % 2 :]
        case = AttentionCase(16, 2, share, head_dim, None, [300, 1, 17, 160], prefills, step)
        work = case.build(dtype, str(device))
        spans = [
            Span(query_len, context, table)
            for (query_len, context), table in zip(work.spans, work.tables, strict=True)
        ]
        unwritten = np.full(len(work.query), -1, dtype=np.int64)
        torch.cuda.synchronize()
        with torch.inference_mode(), torch.cuda.stream(stream):
            attention = make(spans, unwritten, work.kv)
            windows = [None, 50, None, 50]
            outs = [
                attention.attend(work.query, work.kv, scale=scale, sliding_window=window)
                for window in windows
            ]
            stream.synchronize()
        for window, out in zip(windows[:2], outs[:2], strict=True):
            want = work.expected(scale, window)
            torch.testing.assert_close(out.cpu().float(), want.float(), atol=bound, rtol=bound)
        assert all(torch.equal(first, again) for first, again in zip(outs[:2], outs[2:], strict=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("block_size", [16, 32])
@pytest.mark.usefixtures("flashinfer")
def test_an_engine_takes_it_at_its_start(device: torch.device, dtype: str, block_size: int) -> None:
    spec = spec_of(128, dtype, frozenset({None, 4096}))
    for wanted in ("auto", "flashinfer"):
        with capture_logs() as events:
            make = choose_attention(wanted, spec, block_size, device)
        assert isinstance(make, FlashInfer), events
        assert events[-1]["event"] == log.ATTENTION_CHOSEN


def test_in_full_precision_an_engine_takes_triton(device: torch.device) -> None:
    spec = spec_of(128, "float32", frozenset({None}))
    assert choose_attention("auto", spec, 16, device) is device_attention
