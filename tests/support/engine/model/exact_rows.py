"""Bits of a runner's rows over whatever company they have: the same in Triton's interpreter and on a GPU.

A walk computes all tokens of some prompts, and gives the logits behind every chunk and all KV. The rule that
it is for: what two walks both give has the same bits, whatever their steps, chunks, blocks and received KV.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, Sampled, SampleSpec
from microserve.services.engine.model.runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0, max_tokens=64, logprobs=2)


@dataclass(frozen=True)
class Walked:
    logits: dict[tuple[int, int], Tensor]
    """[vocab_size] by (prompt, position)."""
    kv: list[Tensor]
    """[layers, 2, tokens, num_kv_heads, head_dim] of each prompt."""
    sampled: dict[tuple[int, int], Sampled]


def alone(runner: ModelRunner, prompts: list[list[int]], *, is_layerwise: bool = True) -> Walked:
    """One prompt at a time, token by token: every position has logits."""
    walked = Walked({}, [], {})
    table = list(range(runner._num_blocks))
    for number, prompt in enumerate(prompts):
        for position in range(len(prompt)):
            _step(runner, [(number, position, position + 1)], prompts, {number: table}, walked, is_layerwise)
        walked.kv.append(_kv(runner, table, len(prompt)))
    return walked


def together(
    runner: ModelRunner,
    prompts: list[list[int]],
    rng: random.Random,
    *,
    is_layerwise: bool = True,
    received: Walked | None = None,
) -> Walked:
    """Any prompts in a step, in any order, in chunks of any length, in any blocks; the pool is NaN before.
    received: the first tokens of some prompts are not computed, but copied from there."""
    for layer in runner._layers:
        layer.fill_(float("nan"))
    size = runner._block_size
    blocks = rng.sample(range(runner._num_blocks), runner._num_blocks)
    tables = {number: [blocks.pop() for _ in range(-(-len(p) // size))] for number, p in enumerate(prompts)}
    done = dict.fromkeys(tables, 0)
    for number, prompt in enumerate(prompts):
        if received is not None and rng.random() < 0.7:
            done[number] = rng.randrange(len(prompt))
            _put(runner, tables[number], received.kv[number][:, :, : done[number]])
    walked = Walked({}, [], {})
    while waiting := [number for number in tables if done[number] < len(prompts[number])]:
        chosen = rng.sample(waiting, rng.randint(1, len(waiting)))
        decoding = rng.random() < 0.5
        pieces = []
        for number in chosen:
            left = len(prompts[number]) - done[number]
            length = 1 if decoding or rng.random() < 0.3 else rng.randint(1, left)
            pieces.append((number, done[number], done[number] + length))
            done[number] += length
        _step(runner, pieces, prompts, tables, walked, is_layerwise)
    walked.kv.extend(_kv(runner, tables[number], len(prompt)) for number, prompt in enumerate(prompts))
    return walked


def differing(one: Walked, other: Walked) -> list[str]:
    """Where bits differ of what both have; empty: nowhere."""
    places = [
        f"logits of prompt {number} at {position}"
        for number, position in one.logits.keys() & other.logits.keys()
        if not equal_bits(one.logits[number, position], other.logits[number, position])
        or one.sampled[number, position] != other.sampled[number, position]
    ]
    pairs = enumerate(zip(one.kv, other.kv, strict=True))
    return places + [f"KV of prompt {number}" for number, (a, b) in pairs if not equal_bits(a, b)]


def equal_bits(a: Tensor, b: Tensor) -> bool:
    raw = {2: torch.int16, 4: torch.int32}[a.element_size()]
    return torch.equal(a.contiguous().view(raw), b.contiguous().view(raw))


class Rerun:
    """A ``Capture`` that computes anew at each replay, and counts them: for a CPU."""

    count = 0

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
        output = run()

        def replay() -> None:
            self.count += 1
            output.copy_(run())

        return replay, output


def _step(
    runner: ModelRunner,
    pieces: list[tuple[int, int, int]],
    prompts: list[list[int]],
    tables: dict[int, list[int]],
    walked: Walked,
    is_layerwise: bool,
) -> None:
    """pieces: (prompt, first position, end)."""
    kept: list[Tensor] = []
    sample = runner._sample

    def keeping(logits: Tensor, specs: list[SampleSpec]) -> list[Sampled]:
        kept.append(logits.cpu().clone())
        return sample(logits, specs)

    runner._sample = keeping  # type: ignore[assignment]
    chunks = [
        Chunk(
            *(number, prompts[number][begin:end], begin, tables[number], begin),
            SampleSpec(GREEDY, prompts[number][:end], [], frozenset()),
        )
        for number, begin, end in pieces
    ]
    try:
        result = runner.execute(Batch(chunks, is_layerwise))
    finally:
        runner._sample = sample
    for (number, _, end), logits, sampled in zip(pieces, kept[0], result.sampled, strict=True):
        assert sampled is not None and sampled.error is None
        walked.logits[number, end - 1] = logits
        walked.sampled[number, end - 1] = sampled


def _kv(runner: ModelRunner, table: list[int], num_tokens: int) -> Tensor:
    held = torch.stack([layer[table] for layer in runner._layers])  # [layer, block, 2, row, head, dim]
    return held.transpose(1, 2).flatten(2, 3)[:, :, :num_tokens].cpu().clone()


def _put(runner: ModelRunner, table: list[int], kv: Tensor) -> None:
    for layer, rows in zip(runner._layers, kv, strict=True):
        for position in range(kv.shape[2]):
            block, row = divmod(position, runner._block_size)
            layer[table[block], :, row] = rows[:, position].to(layer.device)
