"""CUDA graphs without a GPU: the operations of a captured pass, recorded and run again over the same tensors.

Like a graph it bakes in every address, shape and number of the host, and sees later only what is in its
tensors. Like a capture it refuses to read a tensor on the host. Like a graph it keeps nothing alive that it
did not make itself, and refuses to run when such a tensor is gone. The engine's two device operations read
lengths on the device, and become one operation each (``device_operations``), as their kernels are.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

from microserve.kernels.attention import gpu_attention
from microserve.kernels.attention.gpu_attention import DeviceBatch
from microserve.kernels.scatter import block_scatter as scatter
from microserve.services.engine.model.attention import step as attention

_HOST_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
_HOST_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_HOST_METHODS = ("tolist", "numpy", "__array__", "item", "cpu")
"""Of tensors, some without an operation where the tensor is on the host already."""


class HostRead(Exception):
    """A capture would have failed here."""


class Freed(Exception):
    """A replay would have read memory that is somebody else's by now."""


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Callable[[], None]] = []
        self._made: dict[int, Tensor] = {}
        """By id; alive, so that no other tensor gets an id."""
        self._is_in_operation = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Nobody reads a tensor on the host but the operations themselves, which stand for kernels."""
        held = {name: getattr(Tensor, name) for name in _HOST_METHODS}
        try:
            for name, method in held.items():
                setattr(Tensor, name, self._refusing(name, method))
            with self:
                yield
        finally:
            for name, method in held.items():
                setattr(Tensor, name, method)

    def _refusing(self, name: str, method: Any) -> Callable[..., Any]:
        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._is_in_operation:
                raise HostRead(name)
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _reads_on_host(func, args):
            raise HostRead(str(func))
        self._is_in_operation = True
        try:
            made = func(*args, **kwargs)
        finally:
            self._is_in_operation = False
        self._made |= {id(tensor): tensor for tensor in tree_leaves(made) if isinstance(tensor, Tensor)}
        leaves, shape = tree_flatten((args, kwargs))
        if func.overloadpacket.__name__ != "lift_fresh":  # numbers of the host: they are in the graph
            leaves = [self._weakly(leaf) for leaf in leaves]
        self.operations.append(lambda: _run_again(func, leaves, shape, made))
        return made

    def _weakly(self, leaf: Any) -> Any:
        return weakref.ref(leaf) if isinstance(leaf, Tensor) and id(leaf) not in self._made else leaf


def _reads_on_host(func: Any, args: tuple[Any, ...]) -> bool:
    name = func.overloadpacket.__name__
    if name.startswith(("index", "_index")):  # how many a mask takes is a shape
        return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1:2]))
    return name in _HOST_READS or bool(_HOST_TAGS & set(func.tags))


def _run_again(func: Any, leaves: list[Any], shape: TreeSpec, made: Any) -> None:
    args, kwargs = tree_unflatten(map(_there, leaves), shape)
    again = func(*args, **kwargs)
    for old, new in zip(tree_leaves(made), tree_leaves(again), strict=True):
        # The same memory: a view, or an operation in place. What is declared a view (reshape) may be a copy.
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


def _there(leaf: Any) -> Any:
    if not isinstance(leaf, weakref.ref):
        return leaf
    if (tensor := leaf()) is None:
        raise Freed
    return tensor


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], object], Tensor]:
    """A ``decode_graphs.Capture``."""
    recorder = _Recorder()
    with recorder.watched():
        output = run()

    def replay() -> None:
        for operation in recorder.operations:
            operation()

    return replay, output


@custom_op("microserve_test::attend", mutates_args=())
def _attend(
    query: Tensor,
    kv: Tensor,
    starts: Tensor,
    contexts: Tensor,
    tables: Tensor,
    num_decodes: int,
    scale: float,
    window: int,
) -> Tensor:
    batch = DeviceBatch(starts, contexts, tables, num_decodes)
    return gpu_attention.paged_attention(query, kv, batch, scale=scale, sliding_window=window or None)


@custom_op("microserve_test::scatter", mutates_args=("layer",))
def _scatter(key: Tensor, value: Tensor, slots: Tensor, layer: Tensor) -> None:
    scatter.block_scatter(key, value, slots, layer)


class _Attention:
    """Stands for the module ``gpu_attention``."""

    @staticmethod
    def paged_attention(
        query: Tensor, kv: Tensor, batch: DeviceBatch, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        starts, contexts, tables = batch.query_starts, batch.context_lens, batch.block_tables
        out: Tensor = _attend(
            query, kv, starts, contexts, tables, batch.num_decodes, scale, sliding_window or 0
        )
        return out


@contextmanager
def device_operations(patch: Any) -> Iterator[None]:
    """``patch``: pytest's."""
    with patch.context() as patched:
        patched.setattr(attention, "gpu_attention", _Attention)
        patched.setattr(attention, "kv_scatter", _scatter)
        yield
