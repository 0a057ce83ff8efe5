"""One step's work and its result, between scheduler and runner. Plain data; knows no tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from microserve.protocol.sampling import SamplingParams


@dataclass(slots=True)
class SampleSpec:
    """How to choose a sequence's next token."""

    params: SamplingParams
    prompt_token_ids: list[int]
    output_token_ids: list[int]
    eos_token_ids: frozenset[int]


@dataclass(slots=True)
class Chunk:
    """One sequence's share of a step: compute ``token_ids`` at positions ``[start, start + len)``."""

    sequence_id: int
    token_ids: list[int]
    start: int
    block_table: list[int]
    """Blocks of positions ``[0, start + len)``, in order."""
    write_from: int
    """KV of positions below it is not written: it stands in a shared block already."""
    sample: SampleSpec | None
    """Sample the next token from the last position's logits."""


@dataclass(slots=True)
class Batch:
    chunks: list[Chunk]
    is_layerwise: bool = True
    """Some layer is sent or awaited. Else ``on_layer`` may come for all layers at the end of the step."""


@dataclass(slots=True)
class Sampled:
    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]


@dataclass(slots=True)
class StepResult:
    sampled: list[Sampled | None]
    """One per chunk."""


class Runner(Protocol):
    """Computes batches; calls ``on_layer(layer)`` when a layer's KV is written (or its writing is enqueued in
    the stream that the core follows) and before any is read. When it returns or raises, nothing is under way.
    """

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult: ...
