"""Layers that keep a state, called on a packed batch: transformers' own code, sequence by sequence.

    step    chunk 0 | chunk 1 | ...      chunks of one token that have a state go as one batch

A layer asks its cache for the state before the chunk and leaves the one behind it (:class:`LayerState`). It
is read from a request's state blocks and written there, layer by layer, so the blocks may be the same. Owns
that reading and writing. Knows nothing of what a layer does with its state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from microserve.protocol.errors import InternalError
from microserve.services.engine.core.batch import Chunk
from microserve.services.engine.model.spec import StateLayer, StateSpec, StateTensor

Forward = Callable[..., Tensor]


class LayerState:
    """What transformers' layers ask of their cache, for one layer; None: nothing came before."""

    def __init__(self, conv: Tensor | None = None, recurrent: Tensor | None = None) -> None:
        """conv: [batch, channels, kernel size], the last inputs; written in place. recurrent: [batch,
        ...]."""
        self.conv, self.recurrent = conv, recurrent

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return self.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        return False

    def update_conv_state(
        self, new: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int
    ) -> Tensor:
        """new: [batch, channels, tokens]. What the convolution is to see: with the inputs before, if any."""
        if self.conv is None:
            full = pad(new, (max(0, conv_kernel_size - new.shape[-1]), 0))
        else:
            full = torch.cat([self.conv, new], dim=-1)
        self.conv = full[..., -conv_kernel_size:]
        return full

    def update_recurrent_state(self, new: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.recurrent = new
        return new


class StepStates:
    """The states of one step's sequences."""

    def __init__(self, spec: StateSpec, kv_layers: Sequence[Tensor], chunks: Sequence[Chunk]) -> None:
        """kv_layers: of the pool, contiguous [num_blocks, ...]; chunks: in the order of their rows. Raises
        :class:`InternalError` for a chunk whose blocks do not hold its state."""
        self._layers = {each.layer: each for each in spec.layers}
        self._pool = [each.view(each.shape[0], -1).view(torch.uint8) for each in kv_layers]
        block_nbytes = self._pool[0].shape[1]
        self._single: list[tuple[int, Chunk]] = []
        """Chunks of one token, with the row of each."""
        self._longer: list[tuple[int, Chunk]] = []
        """And the others, with the first row of each."""
        first = 0
        for chunk in chunks:
            for blocks in (chunk.state_from, chunk.state_to):
                if blocks is not None and len(blocks) * block_nbytes < spec.nbytes:
                    raise InternalError(
                        f"chunk of sequence {chunk.sequence_id}: {len(blocks)} blocks of {block_nbytes} "
                        f"bytes do not hold a state of {spec.nbytes}"
                    )
            if chunk.start and chunk.state_from is None:
                raise InternalError(f"chunk of sequence {chunk.sequence_id} goes on without a state")
            is_single = len(chunk.token_ids) == 1 and chunk.state_from is not None
            (self._single if is_single else self._longer).append((first, chunk))
            first += len(chunk.token_ids)

    def mix(self, layer: int, forward: Forward, hidden: Tensor) -> Tensor:
        """One layer of the model over all chunks. hidden: [1, T, hidden size]; returns the same shape."""
        its = self._layers[layer]
        out = torch.empty_like(hidden)
        if self._single:
            rows = torch.tensor([row for row, _ in self._single], device=hidden.device)
            state = self._read(its, [chunk for _, chunk in self._single])
            mixed = forward(hidden[0, rows].unsqueeze(1), cache=state)
            out[0, rows] = mixed.squeeze(1)
            self._write(its, state, [chunk for _, chunk in self._single])
        for row, chunk in self._longer:
            end = row + len(chunk.token_ids)
            state = self._read(its, [chunk]) if chunk.state_from is not None else LayerState()
            out[:, row:end] = forward(hidden[:, row:end], cache=state)
            self._write(its, state, [chunk])
        return out

    def _read(self, layer: StateLayer, chunks: Sequence[Chunk]) -> LayerState:
        found = [
            torch.stack([self._tensor(layer, tensor, chunk.state_from or []) for chunk in chunks])
            for tensor in layer.tensors
        ]
        return LayerState(*found)

    def _write(self, layer: StateLayer, state: LayerState, chunks: Sequence[Chunk]) -> None:
        for tensor, values in zip(layer.tensors, (state.conv, state.recurrent), strict=False):
            if values is None or tuple(values.shape[1:]) != tensor.shape:
                shape = None if values is None else tuple(values.shape[1:])
                raise InternalError(f"layer {layer.layer} leaves a state of {shape}, not {tensor.shape}")
            for each, chunk in zip(values.to(_DTYPES[tensor.dtype]), chunks, strict=True):
                if chunk.state_to is None:
                    continue
                flat = each.contiguous().view(-1).view(torch.uint8)
                for block, begin, end, at in self._pieces(tensor, chunk.state_to):
                    self._pool[layer.kv_layer][block, begin:end] = flat[at : at + end - begin]

    def _tensor(self, layer: StateLayer, tensor: StateTensor, blocks: Sequence[int]) -> Tensor:
        """A copy."""
        pool = self._pool[layer.kv_layer]
        pieces = [pool[block, begin:end] for block, begin, end, _ in self._pieces(tensor, blocks)]
        return torch.cat(pieces).view(_DTYPES[tensor.dtype]).view(tensor.shape)

    def _pieces(self, tensor: StateTensor, blocks: Sequence[int]) -> list[tuple[int, int, int, int]]:
        """``(block, first byte, end, place in the tensor)`` of each block that has a part of it."""
        size = self._pool[0].shape[1]
        begin, end = tensor.begin, tensor.begin + tensor.nbytes
        pieces = []
        for number in range(begin // size, -(-end // size)):
            low, high = max(begin, number * size), min(end, (number + 1) * size)
            pieces.append((blocks[number], low - number * size, high - number * size, low - begin))
        return pieces


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def install(module: nn.Module, spec: StateSpec, step_name: str) -> None:
    """From now on layers with a state take it from the step that comes as keyword ``step_name``, whose
    ``states`` are a :class:`StepStates`."""
    blocks: Any = module.get_submodule("model.layers")
    for each in spec.layers:
        mixer = getattr(blocks[each.layer], spec.mixer)
        mixer.forward = partial(_mix, mixer.forward, each.layer, step_name)


def _mix(
    forward: Forward, layer: int, step_name: str, hidden_states: Tensor, *, cache: Any = None, **kwargs: Any
) -> Tensor:
    step = kwargs.get(step_name)
    if step is None or step.states is None:
        raise InternalError(f"layer {layer} keeps a state, and was called without {step_name}")
    if cache is not None or kwargs.get("attention_mask") is not None:
        raise InternalError(f"layer {layer} was given a cache or a mask besides")
    states: StepStates = step.states
    return states.mix(layer, forward, hidden_states)
