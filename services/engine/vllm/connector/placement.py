"""vLLM's KV cache is the data region of our heap: what peers write is where vLLM reads.

vLLM allocates all of it by one ``torch.zeros`` of bytes, inside the context that a connector may give it.
There we answer that one call with the heap's data; :meth:`Placement.require_placed` then holds vLLM's own
views of every layer against the heap, so a version that allocates in another way does not start.

Owns the heap of the worker's process. Knows tensors by their addresses only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from microserve.kvcache.heap.doors.host import HostHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError


class Placement(TorchFunctionMode):
    """The context of vLLM's allocation."""

    def __init__(
        self,
        make_layout: Callable[[], KvLayout],
        *,
        incarnation: int,
        num_slots: int,
        refuse: Callable[[ConfigError], None],
    ) -> None:
        """``make_layout`` is called as the allocation begins: only then vLLM has chosen its kernels.
        ``refuse`` hears what is then raised."""
        super().__init__()
        self._refuse = refuse
        self._make_layout = make_layout
        self._incarnation = incarnation
        self._num_slots = num_slots
        self._heap: HostHeap | None = None

    @property
    def is_entered(self) -> bool:
        return self._heap is not None

    @property
    def heap(self) -> HostHeap:
        """It reaches peers on other hosts through their doors; its own, if any, are the front's."""
        if self._heap is None:
            raise ConfigError("vLLM has allocated its KV cache without asking for our memory", field="vllm")
        return self._heap

    def __enter__(self) -> Placement:
        try:
            self._heap = self._make_heap()
        except ConfigError as error:
            self._refuse(error)
            raise
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _make_heap(self) -> HostHeap:
        layout = self._make_layout()
        heap = HostHeap(layout, incarnation=self._incarnation, num_slots=self._num_slots)
        # All of it now: a peer's put, or a step, would wait for every page that it touches first.
        if heap.back(0, layout.num_blocks) < layout.num_blocks:
            heap.close()
            raise ConfigError(
                f"kv_cache_memory_bytes: there is no shared memory for {layout.data_nbytes} bytes",
                field="kv_cache_memory_bytes",
            )
        return heap

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        nbytes = self.heap.layout.data_nbytes
        if func is torch.zeros and kwargs.get("dtype") is torch.int8 and args in ((nbytes,), ((nbytes,),)):
            return torch.from_numpy(self.heap.data.view(np.int8))
        return func(*args, **kwargs)

    def require_placed(self, names: list[str], views: dict[str, torch.Tensor]) -> None:
        """``views``: of every layer, ``[block, ...]``. :class:`ConfigError` if one is somewhere else."""
        layout = self.heap.layout
        if set(views) != set(names) or len(names) != layout.num_layers:
            raise ConfigError(
                f"vLLM's layers with KV are {sorted(views)}, not {sorted(names)}", field="model"
            )
        base = self.heap.data.ctypes.data
        for layer, name in enumerate(names):
            view = views[name]
            found = (view.data_ptr() - base, view.shape[0], view.stride(0) * view.element_size())
            expected = (layer * layout.layer_nbytes, layout.num_blocks, layout.block_nbytes)
            if found != expected or view[0].numel() * view.element_size() != layout.block_nbytes:
                raise ConfigError(
                    f"vLLM's {name}: offset, blocks and bytes of a block are {found}, not {expected}",
                    field="vllm",
                )
