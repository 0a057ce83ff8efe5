"""Triton kernels compiled to machine code for a GPU that is not there, as a launch does it.

Pointers and strides are multiples of 16, which decides on vector loads and pipelining.
"""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

from typing import Any

import torch

LEAST_SHARED_NBYTES = 99 << 10
"""A thread block's share on sm_86 and sm_89; sm_80 has 163 KiB and sm_90 227 KiB."""
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ARCHITECTURES = [80, 90]


def compiled(kernel: Any, architecture: int, types: str, constants: dict[str, Any], **options: int) -> Any:
    """types: of the arguments that are no constants, in order; ``:16`` for a multiple of 16."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    given = iter(types.split())
    signature = {name: "constexpr" if name in constants else next(given) for name in kernel.arg_names}
    assert next(given, None) is None
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, type_ in enumerate(signature.values())
        if type_.startswith("*") or type_.endswith(":16")
    }
    plain = {name: type_.removesuffix(":16") for name, type_ in signature.items()}
    source = ASTSource(kernel, signature=plain, constexprs=constants, attrs=aligned)
    result = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    assert result.asm["cubin"][:4] == b"\x7fELF"
    assert result.metadata.shared <= LEAST_SHARED_NBYTES
    return result


def geometry(head_dim: int, share: int = 4, window: int = 0) -> dict[str, Any]:
    from microserve.kernels.attention.triton_attention import padded

    sizes = {"BLOCK_SIZE": 16, "NUM_KV_HEADS": 8, "HEAD_DIM": head_dim, "DIM": padded(head_dim)}
    return sizes | {"SHARE": share, "WINDOW": window}
