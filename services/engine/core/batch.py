"""One step's work and its result, between scheduler and runner. Plain data; knows no tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, overload

from microserve.protocol.errors import InternalError, MeshError
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.guidance.guide import Guide, Mask


class TokenView(Sequence[int]):
    """Tokens ``[begin, end)`` of a list that only grows at its end, without a copy: a context is long, and a
    step asks for it of every sequence."""

    __slots__ = ("_begin", "_end", "_token_ids")

    def __init__(self, token_ids: list[int], begin: int, end: int) -> None:
        self._token_ids, self._begin, self._end = token_ids, begin, end

    def __len__(self) -> int:
        return self._end - self._begin

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> list[int]: ...
    def __getitem__(self, index: int | slice) -> int | list[int]:
        places = range(self._begin, self._end)[index]
        if isinstance(places, range):
            return [self._token_ids[place] for place in places]
        return self._token_ids[places]

    def __iter__(self) -> Iterator[int]:
        return iter(self._token_ids[self._begin : self._end])


@dataclass(slots=True)
class SampleSpec:
    """How to choose a sequence's next token. Good for its own step."""

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    eos_token_ids: frozenset[int]
    guide: Guide | None = None
    """What says which tokens may be chosen; None: all may."""
    allowed: Mask | None = None
    """What it says of this position, once it was asked."""


@dataclass(frozen=True, slots=True)
class ScoreSpec:
    """Of which rows of a chunk the next token is known and its log-probability wanted."""

    first: int
    """Row in the chunk."""
    targets: list[int]
    """The token behind each row from there on; at least one."""
    num_top: int
    """Likeliest tokens that are told with each."""


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
    score: ScoreSpec | None = None
    state_from: list[int] | None = None
    """Of a hybrid model: the blocks that hold its state behind position ``start - 1``; None: it has none
    yet."""
    state_to: list[int] | None = None
    """And those that take it behind the chunk's last position, which may be the same; None: nobody wants
    it."""


@dataclass(slots=True)
class Batch:
    chunks: list[Chunk]
    is_layerwise: bool = True
    """Some layer is sent or awaited. Else ``on_layer`` may come late, and for some layers alone; once
    at least."""


@dataclass(slots=True)
class Sampled:
    token_id: int
    logprob: float | None
    top: list[tuple[int, float]]
    error: MeshError | None = None
    """Why there is no token, and ``token_id`` is -1: it ends its own sequence and no other."""


@dataclass(frozen=True, slots=True)
class Scored:
    """What a chunk's ``score`` asked for."""

    rows: bytes
    """As in ``PromptLogprobs.rows``, one for each of the targets."""
    num_top: int
    error: MeshError | None = None
    """Why there are no rows: it ends its own sequence and no other."""


@dataclass(slots=True)
class StepResult:
    sampled: list[Sampled | None]
    """One per chunk."""
    scored: dict[int, Scored] = field(default_factory=dict)
    """By place in the batch, of each chunk that asked."""


def constrain(batch: Batch) -> dict[int, Sampled]:
    """Ask the guides of a batch for their masks: before it runs, without the engine's lock. By its place in
    the batch what stands for a token where a guide has failed: that sequence's end and no other's."""
    failed = {}
    for place, chunk in enumerate(batch.chunks):
        spec = chunk.sample
        if spec is not None and spec.guide is not None:
            try:
                spec.allowed = spec.guide.allowed(spec.output_token_ids)
            except MeshError as error:
                failed[place] = Sampled(-1, None, [], error)
            except Exception as error:  # a library's fault over one grammar costs nobody else an engine
                broken = InternalError(f"the grammar's mask: {error!r}"[:512])
                failed[place] = Sampled(-1, None, [], broken)
    return failed


class Runner(Protocol):
    """Computes batches; calls ``on_layer(layer)`` when a layer's KV is written (or its writing is enqueued in
    the stream that the core follows) and before any is read. When it returns or raises, nothing is under way.
    """

    @property
    def numerics(self) -> Numerics:
        """In which class it computes; the same for its life."""

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult: ...
