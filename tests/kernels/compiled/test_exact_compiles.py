"""Exact kernels as a GPU would run them: one machine code of each for all batches, no sum of the compiler's.

Nothing is run: Triton's interpreter has the values (interpreted/exact.py), a GPU the rest (tests/gpu).
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch

from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.exact.launch import OPTIONS, in_place, kernels_digest
from tests.support.engine.device.compiled_kernel import ARCHITECTURES, NAMES, compiled, geometry

triton = pytest.importorskip("triton", reason="no triton: its kernels are not compiled")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET is set: nothing can be compiled", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("own_triton_cache")

DTYPES = [torch.float32, torch.bfloat16]


def joins(ptx: str) -> bool:
    """Whether a product and a sum of fp32 were made one operation."""
    return "fma.rn.f32" in ptx or "fma.rn.ftz.f32" in ptx


def cases(*of_each: list[Any]) -> list[Any]:
    """The last of each in the short suite; compiling takes a second each."""
    *more, last = itertools.product(*of_each)
    return [*(pytest.param(*case, marks=pytest.mark.heavy) for case in more), last]


@pytest.mark.parametrize(("dtype", "architecture"), cases(DTYPES, ARCHITECTURES))
def test_product(architecture: int, dtype: torch.dtype) -> None:
    from microserve.kernels.exact.triton_product import TILES, product_kernel

    tiles, name = TILES[dtype.itemsize], NAMES[dtype]
    constants = {"OUTS": 1536, "INS": 576, "BIASED": True}
    constants |= {"ROWS": tiles.rows, "COLUMNS": tiles.columns, "DEPTH": tiles.depth}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **OPTIONS}
    types = f"*{name} *{name} *{name} *{name} i32"
    ptx = compiled(product_kernel, architecture, types, constants, **options).asm["ptx"]
    assert "cp.async" in ptx  # the next tiles are under way
    if dtype != torch.float32:
        assert ("wgmma" if architecture == 90 else "mma.sync") in ptx
        assert not joins(ptx)


@pytest.mark.parametrize(("dtype", "head_dim", "architecture"), cases(DTYPES, [64, 256, 128], ARCHITECTURES))
def test_attention(architecture: int, head_dim: int, dtype: torch.dtype) -> None:
    from microserve.kernels.exact.triton_segments import SEGMENT, segment_kernel, segment_tiles

    tiles, name = segment_tiles(head_dim, dtype.itemsize), NAMES[dtype]
    constants = geometry(head_dim) | {"SHARE_ROWS": 4, "ROWS": tiles.rows, "KEYS": tiles.keys}
    options = {"num_warps": tiles.num_warps, "num_stages": tiles.num_stages, **OPTIONS}
    types = f"*{name} *{name} *fp32 *fp32 *i32 *i32 *i32 i32 fp32 i32 i32 i32"
    constants |= {"SEGMENT": SEGMENT}
    ptx = compiled(segment_kernel, architecture, types, constants, **options).asm["ptx"]
    assert "cp.async" in ptx
    if dtype != torch.float32:
        assert ("wgmma" if architecture == 90 else "mma.sync") in ptx
        assert not joins(ptx)


@pytest.mark.parametrize(("architecture",), cases(ARCHITECTURES))
def test_the_rest(architecture: int) -> None:
    from microserve.kernels.attention.triton_attention import reduce_kernel
    from microserve.kernels.exact.triton_rows import VALUES, norm_kernel, norm_warps, silu_kernel
    from microserve.kernels.exact.triton_segments import MERGED

    norm = {"LENGTH": 4096, "TILE": 4096}
    merge = {"HEAD_DIM": 128, "DIM": 128, "CHUNK": MERGED}
    results = [
        compiled(
            norm_kernel, architecture, "*bf16 *bf16 *bf16 fp32", norm, num_warps=norm_warps(4096), **OPTIONS
        ),
        compiled(silu_kernel, architecture, "*bf16 *bf16 i32", {"TILE": VALUES}, num_warps=4, **OPTIONS),
        compiled(reduce_kernel, architecture, "*fp32 *fp32 *bf16 i32:16 i32", merge, num_warps=4, **OPTIONS),
    ]
    assert not any(joins(result.asm["ptx"]) for result in results)
    # That a compiler left to itself does: the merge is sums of products.
    free = compiled(reduce_kernel, architecture, "*fp32 *fp32 *bf16 i32:16 i32", merge, num_warps=4)
    assert joins(free.asm["ptx"])


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """By kernel: what Triton would make a machine code of its own for. Nothing runs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    found: dict[str, set[str]] = {}

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        bind = create_function_from_signature(self.signature, self.params, backend)
        _, specialisation, rest = bind(*args, **options)
        found.setdefault(self.fn.__name__, set()).add(repr((specialisation, sorted(rest.items()))))

    monkeypatch.setattr(JITFunction, "run", run)
    return found


COUNTS = [1, 2, 15, 16, 17, 48, 333]


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_number_of_rows_has_a_kernel_of_its_own(launches: dict[str, set[str]], dtype: torch.dtype) -> None:
    from microserve.kernels.exact.triton_product import product
    from microserve.kernels.exact.triton_rows import rms_norm, silu
    from microserve.kernels.exact.triton_segments import paged_attention

    kv = torch.zeros(40, 2, 16, 2, 64, dtype=dtype)
    for count in COUNTS:
        wide = torch.zeros(count + 1, 64, dtype=dtype)
        for x in (wide[1:], torch.zeros(64 * count + 1, dtype=dtype)[1:].view(count, 64)):
            product(x, torch.zeros(80, 64, dtype=dtype))
            rms_norm(x, torch.zeros(64, dtype=dtype), 1e-5)
            silu(x)
        for lengths, width in (([1] * count, 1), ([count], 30), ([1, count], 31)):
            batch = DeviceBatch(
                torch.tensor([0, *lengths]).cumsum(0).int(),
                torch.full((len(lengths) + 1,), 400, dtype=torch.int32)[1:],
                torch.zeros(len(lengths), width, dtype=torch.int32),
                0,
            )
            paged_attention(torch.zeros(sum(lengths), 4, 64, dtype=dtype), kv, batch, scale=0.125)
    assert {name: len(kinds) for name, kinds in launches.items()} == dict.fromkeys(
        ["product_kernel", "norm_kernel", "silu_kernel", "segment_kernel", "reduce_kernel"], 1
    )


def test_the_ordinary_attention_has_several(launches: dict[str, set[str]]) -> None:
    """So what the test above looks at is what Triton looks at: an address that is no multiple of 16."""
    from microserve.kernels.attention.triton_attention import launch_decode

    kv, lens = torch.zeros(4, 2, 16, 1, 64), torch.ones(2, dtype=torch.int32)
    for memory in (torch.zeros(130), torch.zeros(130)[1:]):
        query = memory[:128].view(2, 1, 64)
        launch_decode(
            *(query, kv, query, lens, torch.zeros(2, 4, dtype=torch.int32)),
            num_decodes=2,
            num_splits=1,
            scale=1.0,
            window=0,
        )
    assert len(launches["decode_kernel"]) == 2


def test_a_tensor_stays_where_it_is_unless_it_must_move() -> None:
    whole = torch.zeros(9, 8)
    assert in_place(whole).data_ptr() == whole.data_ptr()
    assert in_place(whole.view(-1)[1:]).data_ptr() % 16 == 0
    assert in_place(whole.T).is_contiguous()


def test_the_digest_is_of_sources_and_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    before = kernels_digest()
    assert kernels_digest() == before
    monkeypatch.setattr("microserve.kernels.exact.launch.version", lambda _: "9.9")
    assert kernels_digest() != before
