"""Our calls against the installed FlashInfer: its own Python, with only the compiled module replaced.

Skipped where it is not installed. Its kernels need a GPU: ``tests/gpu/engine/test_flashinfer_on_device.py``.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from structlog.testing import capture_logs
from torch import Tensor

from microserve.kernels import cuda_module
from microserve.protocol import log
from microserve.services.engine.model.attention.flashinfer import FlashInfer, load_flashinfer
from microserve.services.engine.model.attention.step import device_attention
from microserve.services.engine.model.attention_choice import choose_kernels, try_out
from microserve.services.engine.model.spec import ModelSpec
from tests.support.engine.device.flashinfer_stand_in import StandInWrapper, attend

pytest.importorskip("flashinfer", reason="FlashInfer is not installed: its signatures are not checked")

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
    sliding_windows=frozenset({None, 7}),
)


class Compiled:
    """The module that FlashInfer would compile; on arguments that have come through its Python."""

    PAGED_RUN = (
        *("float_workspace", "int_workspace", "plan_info", "q", "k_cache", "v_cache", "qo_indptr"),
        *("paged_kv_indptr", "paged_kv_indices", "paged_kv_last_page_len", "out", "lse", "mask_mode"),
        *("layout", "window_left", "enable_pdl", "custom_mask", "mask_indptr", "alibi_slopes"),
        *("prefix_len_ptr", "token_pos_in_items_ptr", "max_item_len_ptr", "logits_soft_cap", "sm_scale"),
    )

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        self.arguments = arguments

    def plan(self, *arguments: Any) -> list[int]:
        starts, page_starts, contexts, num_rows, batch_size, *shape = arguments[3:]
        assert (starts.dtype, page_starts.dtype, contexts.dtype) == (torch.int32,) * 3
        assert contexts.tolist() == [24, 49]
        assert (num_rows, batch_size) == (34, 2)
        assert shape[:7] == [6, 2, 16, False, 64, 64, True]  # heads, page, no graph, head_dim, causal
        return []

    def paged_run(self, *arguments: Any) -> None:
        from flashinfer.utils import MaskMode, TensorLayout

        given = dict(zip(self.PAGED_RUN, arguments, strict=False))
        assert given["mask_mode"] == MaskMode.CAUSAL.value
        assert given["layout"] == TensorLayout["NHD"].value
        assert (given["logits_soft_cap"], given["custom_mask"]) == (0.0, None)
        kv = torch.stack([given["k_cache"], given["v_cache"]], 1)
        arrays = tuple(given[name] for name in self.PAGED_RUN[6:10])
        out = attend(given["q"], kv, arrays, scale=given["sm_scale"], window_left=given["window_left"])
        given["out"].copy_(out)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """Those that were asked for. Whatever looks at a device is answered for one."""
    from flashinfer import prefill

    made: list[Compiled] = []

    def module(*arguments: Any) -> Compiled:
        made.append(Compiled(arguments))
        return made[-1]

    plain_empty = torch.empty

    def empty(*arguments: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        return plain_empty(*arguments, **options)

    monkeypatch.setattr(prefill, "get_batch_prefill_module", module)
    monkeypatch.setattr(prefill, "device_support_pdl", lambda device: False)
    monkeypatch.setattr(torch, "empty", empty)
    yield made


@pytest.mark.parametrize("backend", ["fa2", "fa3"])
def test_one_step_through_its_python_is_attention(
    modules: list[Compiled], monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setattr(cuda_module, "num_multiprocessors", lambda device: 132)
    try_out(FlashInfer(load_flashinfer(CPU, 6, 2, 64, backend)), SPEC, 16, CPU)
    # Compiled for layers with a window and for those without; no soft cap, no scores in fp16, no positions.
    bf16 = torch.bfloat16
    kernels = {(bf16, bf16, bf16, torch.int32, 64, 64, 0, window, False, False) for window in (False, True)}
    assert {made.arguments for made in modules} == {(backend, *kernel) for kernel in kernels}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: its first step would not fail")
def test_without_a_gpu_its_own_failure_leads_to_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_module, "num_multiprocessors", lambda device: 132)
    with capture_logs() as events:
        make = choose_kernels("auto", SPEC, 16, CPU, {"fa2": lambda: load_flashinfer(CPU, 6, 2, 64, "fa2")})
    assert make is device_attention
    assert [event["event"] for event in events] == [log.KERNEL_MISSING, log.ATTENTION_CHOSEN]


@pytest.mark.parametrize("name", ["plan", "run"])
def test_the_stand_in_takes_nothing_that_the_package_does_not_take(name: str) -> None:
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    theirs = inspect.signature(getattr(BatchPrefillWithPagedKVCacheWrapper, name)).parameters
    ours = inspect.signature(getattr(StandInWrapper, name)).parameters
    positional = [p.name for p in ours.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert list(theirs)[: len(positional)] == positional
    assert set(ours) <= set(theirs)
    needed = {p.name for p in theirs.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    assert needed <= set(ours)
