"""Numbers in (0, 1) that are a function of (seed, position, token) alone, on any device the same to the bit.

Owns the function. Word ``t`` of the stream of Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC11) with key ``seed`` and the counter's third word ``position``, its first word counting up
from 1, as numpy's generator does; of it the top 52 bits and a half, as a fraction. Must not know what is
drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor


def uniforms(seed: int, position: int, count: int) -> npt.NDArray[np.float64]:
    """[count] numbers for tokens 0 to ``count - 1``. seed: in [0, 2^63); position: at least 0."""
    words = np.random.Philox(key=seed, counter=position << 128).random_raw(count)
    return np.asarray(((words >> np.uint64(12)) + 0.5) * 2.0**-52, dtype=np.float64)


def uniform_rows(seeds: Tensor, positions: Tensor, count: int) -> Tensor:
    """[rows, count] float64 on the device of ``seeds``: row by row what ``uniforms`` gives.

    seeds, positions: [rows] int64, contiguous. Enqueued in the current stream; waits for nothing. Raises
    ``ValueError`` naming the argument.
    """
    import torch

    for name, tensor in (("seeds", seeds), ("positions", positions)):
        if tensor.dtype != torch.int64 or tensor.shape != seeds.shape[:1] or not tensor.is_contiguous():
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, contiguous int64 [rows] needed"
            )
        if tensor.device != seeds.device:
            raise ValueError(f"{name} is on {tensor.device}, seeds on {seeds.device}")
    if seeds.is_cuda:
        from microserve.kernels import triton_philox

        out = torch.empty(len(seeds), count, dtype=torch.float64, device=seeds.device)
        with torch.cuda.device(seeds.device):
            triton_philox.launch(seeds, positions, out)
        return out
    rows = [uniforms(seed, at, count) for seed, at in zip(seeds.tolist(), positions.tolist(), strict=True)]
    return torch.from_numpy(np.stack(rows)) if rows else torch.empty(0, count, dtype=torch.float64)
