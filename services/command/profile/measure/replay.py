"""One model over a pool of its own: a prompt's KV, and what the model goes on with from any KV.

Owns the calls of the model, which are an engine's: its loader, its attention over blocks, one packed call.
Only whole blocks of a prompt are KV that travels; the receiver computes what is behind them, so that it is
part of every continuation. Must not know codecs. For one thread.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.attention.paged_attention import Span, Workspace
from microserve.services.engine.model.attention.step import (
    HostAttention,
    MakeAttention,
    StepAttention,
    device_attention,
)
from microserve.services.engine.model.model import DTYPES, STEP, AttentionStep, LoadedModel

SINK_TOKENS = 4
"""First tokens of a prompt, which heads look at that look for nothing."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Kv:
    """Of the whole blocks of one prompt: [layers, 2, tokens, row_nbytes], keys before values."""

    rows: Bytes

    @property
    def num_tokens(self) -> int:
        return int(self.rows.shape[2])


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens behind KV; of the last ``num_wanted`` of them, what the model says next is wanted."""

    tokens: Sequence[int]
    num_wanted: int


@dataclass(frozen=True, slots=True)
class Continuation:
    """What the model said at the wanted tokens of one branch; on the host."""

    logits: Tensor
    """float32 [num_wanted, vocab_size]"""
    attention: Tensor
    """float32 [layers, num_wanted, heads * head_dim]: what attention gave out."""


class _Listening:
    """A step's attention that keeps what it gives out, or what each head looks at."""

    def __init__(self, attention: StepAttention, rows: Tensor, window: int) -> None:
        """rows: of tokens that it is kept of."""
        self._attention, self._rows, self._window = attention, rows, window
        self._keys: Tensor | None = None
        self.outputs: list[Tensor] = []
        self.far_mass: list[Tensor] = []

    def write(self, kv: Tensor, key: Tensor, value: Tensor) -> None:
        self._keys = key
        self._attention.write(kv, key, value)

    def attend(self, query: Tensor, kv: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
        out = self._attention.attend(query, kv, scale=scale, sliding_window=sliding_window)
        if self._window:
            assert self._keys is not None
            self.far_mass.append(_far_mass(query, self._keys, scale, self._window, sliding_window))
        else:
            self.outputs.append(out.reshape(out.shape[0], -1)[self._rows].float().cpu())
        return out


def _far_mass(query: Tensor, key: Tensor, scale: float, window: int, sliding_window: int | None) -> Tensor:
    """[num_kv_heads]: the part of attention, averaged over the tokens that are far enough in for it, that is
    neither on the last ``window`` tokens nor on the first few; of a group's query heads, the largest."""
    num_tokens, num_heads, _ = query.shape
    group = num_heads // key.shape[1]
    position = torch.arange(num_tokens, device=query.device)
    distance = position[:, None] - position[None, :]
    hidden = distance < 0
    if sliding_window is not None:
        hidden |= distance >= sliding_window
    far = (distance >= window) & (position[None, :] >= SINK_TOKENS)
    counted = position >= window + SINK_TOKENS
    masses = []
    for head in range(num_heads):
        scores = (query[:, head].float() @ key[:, head // group].float().T) * scale
        weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        masses.append((weights * far).sum(-1)[counted].mean())
    return torch.stack(masses).view(-1, group).amax(1).nan_to_num().cpu()


@dataclass(frozen=True, slots=True)
class _Run:
    """A sequence's share of a call."""

    tokens: Sequence[int]
    start: int
    """Position of the first."""
    table: list[int]
    num_wanted: int

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        return np.arange(self.start, self.start + len(self.tokens))


class Replay:
    def __init__(self, model: LoadedModel, block_size: int, pool_tokens: int) -> None:
        """pool_tokens: as many of prompts and what is behind them are computed at a time, at least those of
        the longest one."""
        self.spec = spec = model.spec
        self.block_size = block_size
        self._module = model.module
        self._device = next(model.module.parameters()).device
        self._num_blocks = -(-pool_tokens // block_size)
        shape = (self._num_blocks, 2, block_size, spec.num_kv_heads, spec.head_dim)
        self._pool = torch.zeros(spec.num_layers, *shape, dtype=DTYPES[spec.dtype], device=self._device)
        self._make_attention: MakeAttention = partial(HostAttention, workspace=Workspace())
        if self._device.type == "cuda":
            self._make_attention = device_attention

    def num_whole(self, token_ids: Sequence[int]) -> int:
        """Tokens of the prompt's whole blocks; its last token is never among them: what is said behind it is
        wanted."""
        return (len(token_ids) - 1) // self.block_size * self.block_size

    def prefill(self, token_ids: Sequence[int]) -> Kv:
        """Of the prompt's whole blocks."""
        num_tokens = self.num_whole(token_ids)
        table = self._tables([num_tokens])[0]
        self._call([_Run(token_ids[:num_tokens], 0, table, 1)], 0)
        blocks = self._pool[:, : len(table)].transpose(1, 2)
        rows = blocks.reshape(self.spec.num_layers, 2, num_tokens, -1)
        return Kv(rows.contiguous().cpu().view(torch.uint8).numpy())

    def far_masses(self, token_ids: Sequence[int], window: int) -> npt.NDArray[np.float32]:
        """float32 [layers, kv heads]: attention outside the last ``window`` tokens and the first few."""
        table = self._tables([len(token_ids)])[0]
        heard = self._call([_Run(token_ids, 0, table, 1)], window)[1]
        return torch.stack(heard.far_mass).numpy().astype(np.float32)

    def go_on(self, kvs: Sequence[Kv], branches: Sequence[Sequence[Branch]]) -> list[list[Continuation]]:
        """Behind each KV its branches, each as if it were alone; as many in one call as the pool holds."""
        needs = [
            kv.num_tokens // self.block_size + sum(self._num_blocks_of(len(branch.tokens)) for branch in own)
            for kv, own in zip(kvs, branches, strict=True)
        ]
        found: list[list[Continuation]] = []
        for begin, end in self._groups(needs):
            found += self._go_on(kvs[begin:end], branches[begin:end], needs[begin:end])
        return found

    def _go_on(
        self, kvs: Sequence[Kv], branches: Sequence[Sequence[Branch]], needs: Sequence[int]
    ) -> list[list[Continuation]]:
        runs, first = list[_Run](), 0
        for kv, own, need in zip(kvs, branches, needs, strict=True):
            prefix = self._put(kv, first)
            free = first + len(prefix)
            for branch in own:
                count = self._num_blocks_of(len(branch.tokens))
                table = [*prefix, *range(free, free + count)]
                runs.append(_Run(branch.tokens, kv.num_tokens, table, branch.num_wanted))
                free += count
            first += need
        logits, heard = self._call(runs, 0)
        attention = torch.stack(heard.outputs)
        ends = np.cumsum([0, *(run.num_wanted for run in runs)]).tolist()
        host = logits.float().cpu()
        said = ((host[begin:end], attention[:, begin:end]) for begin, end in pairwise(ends))
        return [[Continuation(*next(said)) for _ in own] for own in branches]

    def answers(self, kvs: Sequence[Kv], rests: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
        """Behind each KV and the rest of its prompt the likeliest tokens, one by one, ``num_tokens`` of them,
        or fewer where the model ends before."""
        sizes = [kv.num_tokens + len(rest) + num_tokens for kv, rest in zip(kvs, rests, strict=True)]
        found: list[list[int]] = []
        for begin, end in self._groups([self._num_blocks_of(size) for size in sizes]):
            found += self._answers(kvs[begin:end], rests[begin:end], sizes[begin:end], num_tokens)
        return found

    def _answers(
        self, kvs: Sequence[Kv], rests: Sequence[Sequence[int]], sizes: Sequence[int], num_tokens: int
    ) -> list[list[int]]:
        tables = self._tables(sizes)
        for kv, table in zip(kvs, tables, strict=True):
            self._put(kv, table[0])
        said: list[list[int]] = [[] for _ in kvs]
        runs = {
            index: _Run(rest, kv.num_tokens, table, 1)
            for index, (kv, rest, table) in enumerate(zip(kvs, rests, tables, strict=True))
        }
        while runs:
            logits, _ = self._call(list(runs.values()), 0)
            for (index, run), token in zip(list(runs.items()), logits.argmax(-1).tolist(), strict=True):
                said[index].append(token)
                runs[index] = _Run([token], run.start + len(run.tokens), run.table, 1)
                if len(said[index]) == num_tokens or token in self.spec.eos_token_ids:
                    del runs[index]
        return said

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _tables(self, sizes: Sequence[int]) -> list[list[int]]:
        """Blocks for so many tokens each, one behind the other."""
        ends = np.cumsum([self._num_blocks_of(size) for size in sizes]).tolist()
        return [list(range(begin, end)) for begin, end in pairwise([0, *ends])]

    def _groups(self, needs: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Ranges of neighbours whose blocks the pool holds at a time."""
        begin = used = 0
        for index, need in enumerate(needs):
            if used + need > self._num_blocks and index > begin:
                yield begin, index
                begin, used = index, 0
            used += need
        yield begin, len(needs)

    def _put(self, kv: Kv, first: int) -> list[int]:
        """Into the blocks from ``first`` on, which are returned."""
        num_blocks = kv.num_tokens // self.block_size
        rows = torch.from_numpy(kv.rows).view(self._pool.dtype)
        blocks = rows.view(self.spec.num_layers, 2, num_blocks, *self._pool.shape[3:]).transpose(1, 2)
        self._pool[:, first : first + num_blocks].copy_(blocks)
        return list(range(first, first + num_blocks))

    def _call(self, runs: Sequence[_Run], window: int) -> tuple[Tensor, _Listening]:
        """One packed call. Logits [all that is wanted, vocab_size]; ``window``: 0, or what heads look at is
        wanted and not what they give out."""
        tokens = [token for run in runs for token in run.tokens]
        positions = np.concatenate([run.positions for run in runs])
        slots = [
            np.asarray(run.table)[run.positions // self.block_size] * self.block_size
            + run.positions % self.block_size
            for run in runs
        ]
        ends = np.cumsum([len(run.tokens) for run in runs])
        wanted = np.concatenate(
            [np.arange(end - run.num_wanted, end) for run, end in zip(runs, ends, strict=True)]
        )
        spans = [Span(len(run.tokens), run.start + len(run.tokens), run.table) for run in runs]
        with torch.inference_mode():
            attention = self._make_attention(spans, np.concatenate(slots).astype(np.int64), self._pool[0])
            rows = torch.from_numpy(wanted).to(self._device)
            listening = _Listening(attention, rows, window)
            step = AttentionStep(layers=list(self._pool), attention=listening, on_layer=None)
            output = self._module(
                input_ids=torch.tensor([tokens], device=self._device),
                position_ids=torch.from_numpy(positions).to(self._device).unsqueeze(0),
                use_cache=False,
                logits_to_keep=rows,
                **{STEP: step},
            )
            return output.logits[0], listening
