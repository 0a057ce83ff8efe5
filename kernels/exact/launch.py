"""What every launch of an exact kernel has in common, and the digest of what decides its bits.

The rules. A row's sums are added in one order, by position: of the depth of a product, of a row, of the
context. One tile for all numbers of rows, so that no size takes another instruction; nothing is tuned, no sum
is split by what else there is to do. Triton makes another kernel of the same source where a number is 1 or a
multiple of 16, or an address no multiple of 16: so what varies from step to step is not specialised on, and
addresses are. The compiler may not join a product and a sum where it likes (``enable_fp_fusion``): of two
loops over the same formula it could do so in one.

Owns that. Must not know what the kernels compute. Needs Triton for nothing but its version.
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

ALIGNMENT = 16
"""Bytes: what Triton specialises addresses on."""
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}
"""Of every launch."""

_FOLDER = Path(__file__).parent
_SOURCES = [
    *sorted(_FOLDER.glob("*.py")),
    _FOLDER.parent / "attention" / "triton_attention.py",
    _FOLDER.parent / "triton_address.py",
]


def in_place(tensor: Tensor) -> Tensor:
    """The tensor, or a copy: contiguous, and where Triton takes it for what it takes all others for."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def kernels_digest() -> str:
    """Of the sources and of Triton, which brings its own compiler: equal ones make equal machine code."""
    told = hashlib.sha256(f"triton {version('triton')}".encode())
    for source in _SOURCES:
        told.update(source.read_bytes())
    return told.hexdigest()
