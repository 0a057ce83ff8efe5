"""Every Triton kernel compiles to machine code for sm_80 and sm_90, without a GPU, and fits a device.

Those of ``kernels/exact`` in test_exact_compiles.py.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch

from microserve.kernels.scatter.block_scatter import MAX_THREADS
from tests.support.engine.device.compiled_kernel import ARCHITECTURES, NAMES, compiled, geometry

pytest.importorskip("triton", reason="no triton: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("own_triton_cache")


CASES = [
    (80, torch.bfloat16, 128),
    *((90, torch.bfloat16, dim) for dim in (80, 256)),
    (90, torch.float32, 128),
]
"""Both architectures, a head_dim that is padded, and what takes the most shared memory."""
MORE = [
    *((80, torch.bfloat16, dim) for dim in (64, 256)),
    *((90, torch.bfloat16, dim) for dim in (64, 96, 128)),
    (90, torch.float16, 128),
    (80, torch.float32, 64),
]


def with_heavy(cases: list[Any], more: list[Any]) -> list[Any]:
    """Compiling takes a second each."""
    return [*cases, *(pytest.param(*case, marks=pytest.mark.heavy) for case in more)]


@pytest.mark.parametrize(("architecture", "dtype", "head_dim"), with_heavy(CASES, MORE))
def test_prefill(architecture: int, dtype: torch.dtype, head_dim: int) -> None:
    from microserve.kernels.attention.triton_attention import prefill_kernel, prefill_tiles

    tiles = prefill_tiles(head_dim, dtype.itemsize)
    constants = geometry(head_dim) | {"SHARE_ROWS": 4, "ROWS": tiles.rows, "KEYS": tiles.keys}
    pointer = f"*{NAMES[dtype]}"
    types = f"{pointer} {pointer} {pointer} *i32 *i32 *i32 i32:16 i32:16 i32 fp32 i32 i32"
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    ptx = compiled(prefill_kernel, architecture, types, constants, **options).asm["ptx"]
    assert "cp.async" in ptx  # keys and values are under way while others are worked on
    if dtype != torch.float32:
        assert ("wgmma" if architecture == 90 else "mma.sync") in ptx


# Without a split it is the same code but for the last store: one head_dim is enough.
DECODES = [(*case, True) for case in CASES] + [(80, torch.bfloat16, 128, False)]
MORE_DECODES = [(*case, True) for case in MORE] + [
    (90, torch.bfloat16, 128, False),
    (90, torch.float16, 128, False),
    (90, torch.float32, 128, False),
]


@pytest.mark.parametrize(("architecture", "dtype", "head_dim", "split"), with_heavy(DECODES, MORE_DECODES))
def test_decode(architecture: int, dtype: torch.dtype, head_dim: int, split: bool) -> None:
    from microserve.kernels.attention.triton_attention import decode_kernel, decode_tiles

    tiles = decode_tiles(head_dim, dtype.itemsize)
    constants = geometry(head_dim) | {"ROWS": tiles.rows, "KEYS": tiles.keys, "SPLIT": split}
    pointer = f"*{NAMES[dtype]}"
    types = f"{pointer} {pointer} {pointer} *fp32 *fp32 *i32 *i32 i32:16 i32:16 i32 fp32"
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    ptx = compiled(decode_kernel, architecture, types, constants, **options).asm["ptx"]
    assert "cp.async" in ptx
    if dtype != torch.float32:
        assert "mma.sync" in ptx


@pytest.mark.parametrize("architecture", [80, pytest.param(90, marks=pytest.mark.heavy)])
def test_attention_with_a_window_and_a_share_that_is_no_power_of_two(architecture: int) -> None:
    from microserve.kernels.attention import triton_attention as kernels

    window = geometry(64, share=3, window=4096)
    tiles = kernels.prefill_tiles(64, 2)
    constants = window | {"SHARE_ROWS": 4, "ROWS": tiles.rows, "KEYS": tiles.keys}
    types = "*bf16 *bf16 *bf16 *i32 *i32 *i32 i32:16 i32:16 i32 fp32 i32 i32"
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled(kernels.prefill_kernel, architecture, types, constants, **options)
    tiles = kernels.decode_tiles(64, 2)
    constants = window | {"ROWS": tiles.rows, "KEYS": tiles.keys, "SPLIT": True}
    types = "*bf16 *bf16 *bf16 *fp32 *fp32 *i32 *i32 i32:16 i32:16 i32 fp32"
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages}
    compiled(kernels.decode_kernel, architecture, types, constants, **options)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("head_dim", [80, 256])
def test_reduction(architecture: int, head_dim: int) -> None:
    from microserve.kernels.attention.triton_attention import padded, reduce_kernel

    constants = {"HEAD_DIM": head_dim, "DIM": padded(head_dim), "CHUNK": 16}
    compiled(reduce_kernel, architecture, "*fp32 *fp32 *bf16 i32:16 i32", constants)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("raw", "head_dim"), [("i16", 128), ("i16", 80), ("i32", 64)])
def test_scatter(architecture: int, raw: str, head_dim: int) -> None:
    from microserve.kernels.scatter.triton_scatter import scatter_kernel
    from microserve.kernels.triton_address import pair_tile

    dim, rows = pair_tile(head_dim)
    constants = {"BLOCK_SIZE": 16, "NUM_HEADS": 8, "HEAD_DIM": head_dim, "DIM": dim, "ROWS": rows}
    types = f"*{raw} *{raw} *i64 *{raw} i32 i32 i32:16 i32:16 i32:16 i32:16"
    ptx = compiled(scatter_kernel, architecture, types, constants).asm["ptx"]
    if dim == head_dim:
        assert "ld.global.v4.b32" in ptx  # 16 bytes at a time
        assert "st.global.v4.b32" in ptx


def test_threads_of_a_scatter_fit_its_launch_bounds() -> None:
    from microserve.kernels.cuda_module import SOURCES

    (bound,) = set(re.findall(r"__launch_bounds__\((\d+)\)", (SOURCES / "block_scatter.cu").read_text()))
    assert int(bound) == MAX_THREADS


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_philox(architecture: int) -> None:
    from microserve.kernels.triton_philox import TILE, uniform_kernel

    compiled(uniform_kernel, architecture, "*i64 *i64 *fp64 i32", {"TILE": TILE}, num_warps=4)
