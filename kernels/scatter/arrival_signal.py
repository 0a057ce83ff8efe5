"""The signal that a launch raises when all of its writes have arrived.

Owns the three things that make one, and their check. Must not know what is transferred, nor what a word
means to its reader: the value only has to be larger than any that the word has held, as a reader waits for
"at least".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class ArrivalSignal:
    """Raised once per layer, after every write of that layer in the same launch.

    A reader that waits for ``word >= value`` on a stream, or reads it with acquire and system scope, sees all
    of them (``cuda/arrival.cuh`` says why).
    """

    words: Tensor
    """[num_layers] int64, contiguous, in the receiver's memory: one per layer that the launch writes."""
    value: int
    """What each word becomes, in [1, 2^63)."""
    counters: Tensor
    """[at least num_layers] int32 in the sender's memory, contiguous. Zeroed once, when allocated; the launch
    leaves zeros. All launches that use the same counters must be on one stream."""

    def check(self, num_layers: int, device: torch.device) -> None:
        """Raises ``ValueError`` naming the field that does not fit a launch on ``device``."""
        if self.words.dtype != torch.int64 or self.words.shape != (num_layers,):
            raise ValueError(
                f"signal.words is {self.words.dtype} {tuple(self.words.shape)}, int64 [{num_layers}] needed"
            )
        if not self.words.is_contiguous():
            raise ValueError("signal.words is not contiguous")
        if self.words.device.type != device.type:
            raise ValueError(f"signal.words is on {self.words.device}, the data on {device}")
        if not 1 <= self.value < 1 << 63:
            raise ValueError(f"signal.value {self.value} is outside [1, 2^63)")
        counters = self.counters
        if counters.dtype != torch.int32 or counters.dim() != 1 or counters.numel() < num_layers:
            raise ValueError(
                f"signal.counters is {counters.dtype} {tuple(counters.shape)}, at least {num_layers} int32"
                " are needed"
            )
        if not counters.is_contiguous():
            raise ValueError("signal.counters is not contiguous")
        if counters.device != device:
            raise ValueError(f"signal.counters is on {counters.device}, the launch on {device}")

    def raise_on_cpu(self) -> None:
        """What a launch does last, for tensors in ordinary memory."""
        self.words.fill_(self.value)


def signal_arguments(signal: ArrivalSignal | None) -> tuple[np.uint64, np.uint64, np.uint64]:
    """(counters, words, value) as a kernel takes them; zeros for a launch without a signal."""
    if signal is None:
        return np.uint64(0), np.uint64(0), np.uint64(0)
    return np.uint64(signal.counters.data_ptr()), np.uint64(signal.words.data_ptr()), np.uint64(signal.value)
