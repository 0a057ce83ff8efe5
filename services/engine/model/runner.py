"""Batches in, tokens out: one packed call of a transformers model per step, over KV in the heap's own memory.

Owns the views on the heap's data region, streams and graphs. Must not know which sequences run when
(``scheduler.py``), nor transfers: ``on_layer`` is where the engine sends a layer and waits for one.

    packed call   [1, T]   chunk 0 | chunk 1 | ...        position_ids restart with each chunk
    data region   [layer][block][K | V][row][kv_head][head_dim]

On a GPU a step is enqueued in one stream of the runner's own, and waited for once, at its end: whoever sees
``execute`` return or raise may give the batch's blocks to others, also to writers on other devices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from microserve.kernels.attention.paged_attention import Span, Workspace
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.batch import Batch, Chunk, Runner, SampleSpec, ScoreSpec, StepResult
from microserve.services.engine.model.attention.step import (
    DeviceAttention,
    ExactAttention,
    HostAttention,
    MakeAttention,
    StepAttention,
    device_attention,
    exact_attention,
    upload,
)
from microserve.services.engine.model.device.decode_graphs import Capture, CudaCapture, DecodeGraphs
from microserve.services.engine.model.device.device_sampler import sample_there
from microserve.services.engine.model.device.device_scorer import score_there
from microserve.services.engine.model.model import DTYPES, STEP, AttentionStep, LoadedModel
from microserve.services.engine.model.numerics import transformers_numerics
from microserve.services.engine.model.rows import result_of, rows_of
from microserve.services.engine.model.sampler import sample
from microserve.services.engine.model.scorer import score
from microserve.services.engine.model.state.mixing import StepStates

__all__ = ["ModelRunner", "Runner"]

TRANSFORMERS = "transformers"
"""Of ``kernels``: where the model's own module computes."""


class ModelRunner:
    """A ``Runner`` over a real model. For one thread; holds no state of a step once it has ended.

    kv_data: the heap's data region, uint8, at least ``num_layers * num_blocks * block bytes`` long and on the
    model's device; it is used in place. make_attention: None for what the device is best at, and nothing to a
    model that is exact. Raises :class:`ConfigError` when the region is too small or misaligned.
    """

    def __init__(
        self,
        model: LoadedModel,
        kv_data: npt.NDArray[np.uint8] | Tensor,
        num_blocks: int,
        block_size: int,
        *,
        make_attention: MakeAttention | None = None,
    ) -> None:
        self.spec = model.spec
        self._module = model.module
        self._num_blocks, self._block_size = num_blocks, block_size
        self._layers = self._views(kv_data)
        state = self._state = model.spec.state
        self._of_model = self._layers
        """The views by layers of the model."""
        if state is not None:
            num_layers = len(state.layers) + len(state.kv_layers)
            of_model = dict(zip(state.kv_layers, self._layers, strict=True))
            self._of_model = [of_model.get(layer, self._layers[0]) for layer in range(num_layers)]
        self._device = self._layers[0].device
        self.numerics = model.numerics or transformers_numerics(model.spec, self._device)
        self.kernels = TRANSFORMERS
        """What computes."""
        self._stream: torch.cuda.Stream | None = None
        self._graphs: DecodeGraphs | None = None
        self._graph_attention: type[DeviceAttention] = DeviceAttention
        self._sample, self._score = sample, score
        if model.numerics is not None:
            make_attention, self._graph_attention = exact_attention, ExactAttention
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
            torch.cuda.synchronize(self._device)  # the weights came by another stream
            make_attention = make_attention or device_attention
            self._sample, self._score = sample_there, score_there
        self._make_attention = make_attention or partial(HostAttention, workspace=Workspace())

    def capture_decodes(self, max_num_seqs: int, max_model_len: int, capture: Capture | None = None) -> None:
        """Replay steps of nothing but decodes from now on (decode_graphs.py): costs seconds and memory.
        Raises :class:`ConfigError` where a capture fails, and on a CPU, unless there is a ``capture`` that
        stands for the device's."""
        if self._state is not None:
            raise ConfigError("CUDA graphs do not capture hybrid models", field="engine.cuda_graphs")
        if capture is None:
            if self._stream is None:
                raise ConfigError("CUDA graphs need a CUDA device", field="engine.cuda_graphs")
            capture = CudaCapture(self._stream)
        try:
            with torch.inference_mode(), self._computing():
                self._graphs = DecodeGraphs(
                    self._forward,
                    capture,
                    max_num_seqs=max_num_seqs,
                    max_blocks=min(-(-max_model_len // self._block_size), self._num_blocks),
                    block_size=self._block_size,
                    device=self._device,
                    attention=self._graph_attention,
                )
        except RuntimeError as error:  # whatever torch and the kernels raise; no memory left, most likely
            first: BaseException = error
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__  # ending a capture that has failed fails too
            reason = str(first).strip().partition("\n")[0]
            raise ConfigError(
                f"engine.cuda_graphs: decode steps cannot be captured: {reason}", field="engine.cuda_graphs"
            ) from error

    def warm_up(self) -> None:
        """Have everything compiled and loaded that steps need, by steps that write no KV.

        Else somebody's first tokens would wait for compilers, and so would the first measured rates."""
        params = SamplingParams(temperature=1.0, top_p=0.9, logprobs=1, frequency_penalty=0.1)
        spec = SampleSpec(params, [0], [0], frozenset())
        longest = min(self._num_blocks * self._block_size, self.spec.max_model_len)
        length = min(2 * self._block_size + 1, longest)
        table = list(range(-(-length // self._block_size)))
        scores = ScoreSpec(0, [0] * (length - 1), 1) if length > 1 else None
        chunk = Chunk(0, [0] * length, 0, table, length, spec, scores)
        decode = Chunk(1, [0], 0, table[:1], 1, spec)
        for chunks in ([chunk], [decode], [decode, chunk]):
            self.execute(Batch(chunks))

    def _forward(
        self,
        attention: StepAttention,
        tokens: Tensor,
        positions: Tensor,
        *,
        rows: Tensor | int = 0,
        on_layer: Callable[[int], None] | None = None,
        states: StepStates | None = None,
    ) -> Tensor:
        """Logits [rows, vocab_size] of the tokens at ``rows``; 0: of all."""
        output = self._module(
            input_ids=tokens.unsqueeze(0),
            position_ids=positions.unsqueeze(0),
            use_cache=False,
            logits_to_keep=rows,
            **{STEP: AttentionStep(self._of_model, attention, on_layer, states)},
        )
        logits: Tensor = output.logits[0]
        return logits

    @property
    def stream(self) -> int | None:
        """The CUDA stream in which KV is computed; None on a CPU."""
        return self._stream.cuda_stream if self._stream is not None else None

    @contextmanager
    def _computing(self) -> Iterator[None]:
        if self._stream is None:
            yield
            return
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                # Also for a step that gave way: what it has enqueued writes into its blocks.
                self._stream.synchronize()

    def _views(self, kv_data: npt.NDArray[np.uint8] | Tensor) -> list[Tensor]:
        spec = self.spec
        data = kv_data if isinstance(kv_data, Tensor) else torch.from_numpy(kv_data)
        dtype = DTYPES[spec.dtype]
        shape = (self._num_blocks, 2, self._block_size, spec.num_kv_heads, spec.head_dim)
        nbytes = spec.num_layers * int(np.prod(shape)) * dtype.itemsize
        if data.dtype != torch.uint8 or data.numel() < nbytes or data.data_ptr() % dtype.itemsize:
            raise ConfigError(
                f"the KV region holds {data.numel()} of {data.dtype}, needs {nbytes} aligned bytes",
                field="kvcache.num_blocks",
            )
        return list(data.view(-1)[:nbytes].view(dtype).view(spec.num_layers, *shape))

    def execute(self, batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        """Compute the chunks, sample and score where asked.

        ``on_layer(layer)`` comes once a layer of the pool, in order, when the batch's KV of that layer
        stands in the blocks (on a GPU: when its writing is enqueued in ``stream``) and before any is read;
        of a hybrid model when its states stand there too, the last one after all reading. What it raises
        ends the step and is passed on. For a batch that is not layerwise it may come when all is enqueued.
        Raises :class:`InternalError` for a batch that does not fit the model or the pool.
        """
        chunks = batch.chunks
        if not chunks:
            return StepResult([])
        rows = rows_of(chunks, self.spec, self._num_blocks, self._block_size)
        spans = [Span(len(c.token_ids), c.start + len(c.token_ids), c.block_table) for c in chunks]
        with torch.inference_mode(), self._computing():
            if self._graphs is not None and not batch.is_layerwise and self._graphs.fits(spans):
                logits = self._graphs.run(rows.tokens, rows.positions, rows.slots, spans)
                if len(rows.wanted) < len(chunks):
                    logits = logits[self._tensor(rows.wanted)]
                if on_layer is not None:
                    for layer in range(self.spec.num_layers):
                        on_layer(layer)
            else:
                state = self._state
                logits = self._forward(
                    self._make_attention(spans, rows.slots, self._layers[0]),
                    *(self._tensor(rows.tokens), self._tensor(rows.positions)),
                    rows=self._tensor(rows.wanted),
                    on_layer=on_layer if state is None else _but_last(on_layer, state.kv_layers),
                    states=StepStates(state, self._layers, chunks) if state is not None else None,
                )
                if state is not None and on_layer is not None:
                    on_layer(self.spec.num_layers - 1)
            if not rows.has_scores:
                return result_of(chunks, self._sample(logits, rows.specs))
            scored = self._score(logits, rows.scored, rows.scores)
            sampled = self._sample(logits[self._tensor(rows.sampled)], rows.specs)
            return result_of(chunks, sampled, scored)

    def _tensor(self, values: npt.NDArray[np.int64]) -> Tensor:
        return upload(values, self._device)


def _but_last(
    on_layer: Callable[[int], None] | None, kv_layers: tuple[int, ...]
) -> Callable[[int], None] | None:
    """``on_layer`` of a hybrid model, called with a layer of the model: states that belong to a layer of
    the pool stand by then, but for those behind the last one."""
    if on_layer is None:
        return None
    places = {layer: place for place, layer in enumerate(kv_layers[:-1])}

    def told(layer: int) -> None:
        if (place := places.get(layer)) is not None:
            on_layer(place)

    return told
