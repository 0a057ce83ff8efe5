"""Exact kernels, interpreted, one by one: bits of a row over its company, and closeness to the oracle.

Whoever else is in the batch holds NaN and infinities at times, and so does all that no row may read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.attention.triton_attention import Tiles, launch_decode, launch_prefill
from microserve.kernels.exact.triton_product import product
from microserve.kernels.exact.triton_rows import rms_norm, silu
from microserve.kernels.exact.triton_segments import SEGMENT, paged_attention, segment_tiles
from tests.support.engine.device.kernel_cases import AttentionCase
from tests.support.engine.model.exact_rows import equal_bits

SMALL = Tiles(rows=16, keys=16, num_warps=4, num_stages=2)
SCALE = 0.3
in_short_segments = partial(paged_attention, tiles=SMALL, segment=32, scale=SCALE)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")

seeds = st.integers(0, 2**32)
some = settings(deadline=None, max_examples=8, phases=[Phase.generate])  # to shrink a case takes minutes


def company(rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows in any order among strangers, some without a number: (batch, where the rows are in it)."""
    strangers = torch.randn(
        int(torch.randint(1, 90, (1,), generator=generator)), rows.shape[1], generator=generator
    )
    strangers[::3, 0], strangers[1::3, -1] = float("nan"), float("inf")
    order = torch.randperm(len(rows) + len(strangers), generator=generator)
    batch = torch.cat([rows, strangers.to(rows.dtype)])[order]
    return batch, order.argsort()[: len(rows)]


@some
@given(
    dtype=st.sampled_from(DTYPES),
    ins=st.sampled_from([1, 40, 128, 200]),
    outs=st.sampled_from([1, 63, 64, 130]),
    biased=st.booleans(),
    seed=seeds,
)
def test_a_product(dtype: torch.dtype, ins: int, outs: int, biased: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = (torch.randn(n, ins, generator=generator).to(dtype) for n in (5, outs))
    bias = torch.randn(outs, generator=generator).to(dtype) if biased else None
    alone = torch.cat([product(row[None], weight, bias) for row in rows])
    batch, places = company(rows, generator)
    assert equal_bits(product(batch, weight, bias)[places], alone)
    want = rows.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    torch.testing.assert_close(alone.double(), want, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


def test_no_rows_are_no_launch() -> None:
    assert product(torch.empty(1, 0, 8), torch.ones(3, 8)).shape == (1, 0, 3)
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)


@some
@given(dtype=st.sampled_from(DTYPES), length=st.sampled_from([1, 40, 128, 600]), seed=seeds)
def test_norms_and_activations(dtype: torch.dtype, length: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows, weight = torch.randn(4, length, generator=generator).to(dtype), torch.randn(length).to(dtype)
    wide = rows.float()
    scaled = (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(dtype)
    cases: list[tuple[Callable[[Tensor], Tensor], Tensor]] = [
        (lambda x: rms_norm(x, weight, 1e-5), weight * scaled),
        (silu, torch.nn.functional.silu(rows)),
    ]
    for compute, want in cases:
        alone = torch.cat([compute(row[None]) for row in rows])
        batch, places = company(rows, generator)
        assert equal_bits(compute(batch)[places], alone)
        torch.testing.assert_close(alone, want, atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


class Context:
    """One sequence, in the blocks of some pool."""

    def __init__(self, dtype: torch.dtype, num_tokens: int, share: int, generator: torch.Generator) -> None:
        self.query = torch.randn(num_tokens, 2 * share, 16, generator=generator).to(dtype)
        self.rows = torch.randn(num_tokens, 2, 2, 16, generator=generator).to(dtype)

    def pool(
        self, block_size: int, generator: torch.Generator, num_written: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Other blocks each time; NaN where no token of this sequence is, nor a written one."""
        num_tokens = len(self.rows)
        count = -(-num_tokens // block_size)
        table = torch.randperm(count + 2, generator=generator)[:count]
        kv = torch.full((count + 2, 2, block_size, 2, 16), float("nan"), dtype=self.rows.dtype)
        for position in range(num_tokens if num_written is None else num_written):
            kv[table[position // block_size], :, position % block_size] = self.rows[position]
        return kv, table.int()


def attend(
    context: Context, kv: Tensor, table: Tensor, begin: int, end: int, window: int | None, nbytes: int
) -> Tensor:
    """Tokens [begin, end) in one step, of which the context is all."""
    batch = DeviceBatch(
        query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
        context_lens=torch.tensor([end], dtype=torch.int32),
        block_tables=table[None],
        num_decodes=int(end - begin == 1),
    )
    return in_short_segments(
        context.query[begin:end], kv, batch, sliding_window=window, workspace_nbytes=nbytes
    )


@some
@given(
    dtype=st.sampled_from(DTYPES),
    num_tokens=st.integers(1, 80),
    share=st.integers(1, 5),
    block_size=st.sampled_from([1, 4, 16]),
    window=st.none() | st.integers(1, 60),
    nbytes=st.sampled_from([1, 1 << 26]),
    cuts=st.lists(st.integers(1, 79), max_size=3),
    seed=seeds,
)
def test_attention_of_any_chunking(
    dtype: torch.dtype,
    num_tokens: int,
    share: int,
    block_size: int,
    window: int | None,
    nbytes: int,
    cuts: list[int],
    seed: int,
) -> None:
    """Also in other blocks, and with nothing written yet behind the chunk."""
    generator = torch.Generator().manual_seed(seed)
    context = Context(dtype, num_tokens, share, generator)
    kv, table = context.pool(block_size, generator)
    whole = attend(context, kv, table, 0, num_tokens, window, 1 << 26)
    edges = sorted({0, num_tokens, *(cut for cut in cuts if cut < num_tokens)})
    for begin, end in itertools.pairwise(edges):
        kv, table = context.pool(block_size, generator, num_written=end)
        assert equal_bits(attend(context, kv, table, begin, end, window, nbytes), whole[begin:end])
    for position in {0, num_tokens // 2, num_tokens - 1}:
        kv, table = context.pool(block_size, generator, num_written=position + 1)
        one = attend(context, kv, table, position, position + 1, window, nbytes)
        assert equal_bits(one, whole[position : position + 1])


@some
@given(
    dtype=st.sampled_from(DTYPES),
    decodes=st.lists(st.integers(0, 70), max_size=3),
    prefills=st.lists(
        st.integers(1, 9).flatmap(lambda n: st.tuples(st.just(n), st.integers(n, n + 60))), max_size=3
    ),
    window=st.none() | st.integers(1, 60),
    seed=seeds,
)
def test_attention_in_any_company(
    dtype: torch.dtype,
    decodes: list[int],
    prefills: list[tuple[int, int]],
    window: int | None,
    seed: int,
) -> None:
    """Each sequence of a batch, places without one included, against the same alone, and the oracle."""
    work = AttentionCase(4, 2, 3, 16, window, [*decodes, 33], prefills, seed).build(dtype)
    got = in_short_segments(work.query, work.kv, work.batch, sliding_window=window)
    begin = 0
    for number, (length, context) in enumerate(work.spans):
        rows = slice(begin, begin + length)
        begin += length
        batch = DeviceBatch(
            torch.tensor([0, length], dtype=torch.int32),
            torch.tensor([context], dtype=torch.int32),
            work.batch.block_tables[number : number + 1],
            0,
        )
        one = in_short_segments(work.query[rows], work.kv, batch, sliding_window=window)
        assert equal_bits(got[rows], one)
    want = work.expected(SCALE, window)
    torch.testing.assert_close(got.float(), want.float(), atol=BOUNDS[dtype], rtol=BOUNDS[dtype])


def test_the_ordinary_kernels_do_not_pass() -> None:
    """What is compared here is not there anyway: their bits change with the splits, and from step to step."""
    generator = torch.Generator().manual_seed(1)
    context = Context(torch.float32, 70, 2, generator)
    kv, table = context.pool(4, generator)
    outs = [torch.empty_like(context.query) for _ in range(3)]
    starts, lens = torch.tensor([0, 70], dtype=torch.int32), torch.tensor([70], dtype=torch.int32)
    launch_prefill(
        *(context.query, kv, outs[0], starts, lens, table[None]),
        first_sequence=0,
        scale=SCALE,
        window=0,
        tiles=SMALL,
    )
    for out, num_splits in zip(outs[1:], (1, 3), strict=True):
        launch_decode(
            *(context.query[69:], kv, out[69:], lens, table[None]),
            num_decodes=1,
            num_splits=num_splits,
            scale=SCALE,
            window=0,
            tiles=SMALL,
        )
    prefilled, decoded, split = (out[69] for out in outs)
    torch.testing.assert_close(split, prefilled)
    assert not equal_bits(split, decoded)
    assert not equal_bits(split, prefilled)


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_head_dims_in_use_with_the_tiles_in_use(head_dim: int) -> None:
    work = AttentionCase(16, 1, 3, head_dim, None, [SEGMENT + 30], [(3, 40)], 5).build(torch.bfloat16)
    got = paged_attention(work.query, work.kv, work.batch, scale=head_dim**-0.5)
    bound = BOUNDS[torch.bfloat16]
    want = work.expected(head_dim**-0.5, None)
    torch.testing.assert_close(got.float(), want.float(), atol=bound, rtol=bound)
    assert SEGMENT % segment_tiles(head_dim, 2).keys == 0


def test_a_pool_at_an_odd_address_is_refused() -> None:
    work = AttentionCase(4, 1, 1, 16, None, [3], [], 5).build(torch.float32)
    moved = torch.empty(work.kv.numel() + 1)[1:].view(work.kv.shape)
    with pytest.raises(ValueError, match="no multiple of 16"):
        paged_attention(work.query, moved, work.batch, scale=SCALE)
