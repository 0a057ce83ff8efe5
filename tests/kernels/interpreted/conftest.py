"""For the files here, which run in Triton's interpreter: see ``test_triton_interpreted.py``."""

# mypy: disable-error-code="import-untyped, import-not-found"

from __future__ import annotations

import os
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

Array = npt.NDArray[Any]


@pytest.fixture(scope="session", autouse=True)
def interpreter() -> None:
    """What the interpreter of Triton 3.6 and 3.7 does not do right.

    It turns a scalar into a loop bound in a way that numpy 2.4 refuses. It multiplies matrices of bf16 by
    their bit patterns, and others in whatever order numpy's library has for a tile; here a sum goes along
    the depth in fp32. It cuts what it narrows to bf16, and loses carries where it rounds.
    """
    assert os.environ.get("TRITON_INTERPRET") == "1"
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_with_bounds(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_with_bounds

    convert = interpreter._convert_float

    def convert_rightly(data: Array, source: Any, target: Any, rounding: Any) -> Array:
        if (source, target) == (tl.float32, tl.bfloat16):
            narrow = torch.from_numpy(np.array(data, dtype=np.float32)).bfloat16()
            return narrow.view(torch.int16).numpy().view(np.uint16)
        if (source, target) == (tl.bfloat16, tl.float32):
            return widened(data).view(np.uint32)
        return np.asarray(convert(data, source, target, rounding))

    interpreter._convert_float = convert_rightly

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        left, right = (
            widened(side.data) if side.dtype.scalar == tl.bfloat16 else side.data.astype(np.float32)
            for side in (a, b)
        )
        total = d.data.copy()
        for depth in range(left.shape[1]):
            total += left[:, depth, None] * right[None, depth, :]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    interpreter.InterpreterBuilder.create_dot = create_dot


def widened(data: Array) -> Array:
    """fp32 of bf16's bit patterns."""
    return (np.asarray(data).astype(np.uint32) << 16).view(np.float32)
