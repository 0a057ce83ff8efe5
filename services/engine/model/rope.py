"""Tables of RoPE, made on the host by one method wherever they are used: a numerics class names them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


def rope_tables(rotary: Any, num_positions: int) -> tuple[Floats, Floats]:
    """cos and sin [num_positions, head_dim / 2], float32: of angles as transformers makes them."""
    positions = np.arange(num_positions, dtype=np.float32)
    angles = np.outer(positions, rotary.inv_freq.float().numpy()).astype(np.float64)
    scale = np.float32(rotary.attention_scaling)
    return np.cos(angles).astype(np.float32) * scale, np.sin(angles).astype(np.float32) * scale
