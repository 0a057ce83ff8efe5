"""From a model's directory to what computes it: by its packed file where there is one, else by all of it.

With a packed file (native/packed_cache.py) an engine needs neither torch nor transformers; both are imported
here, when they are needed. Owns that choice, and what serves where kernels or memory are missing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.kvcache.heap.factory import HeapData
from microserve.protocol.errors import ConfigError
from microserve.protocol.process.run import uncollected
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.model.directory.end_tokens import eos_of
from microserve.services.engine.model.directory.model_files import read_json
from microserve.services.engine.native.kernels import choose_kernels, go_without
from microserve.services.engine.native.packed_cache import PackedCache, cache_directory
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.pool_size import check_room

if TYPE_CHECKING:
    from microserve.services.engine.model.attention.step import MakeAttention
    from microserve.services.engine.model.model import LoadedModel
    from microserve.services.engine.model.runner import ModelRunner
    from microserve.services.engine.native.runner import NativeRunner


class Loading:
    """One engine's way to its model. Methods take long: call them from a thread, one at a time."""

    def __init__(self, settings: Settings) -> None:
        """May compile kernels. Raises :class:`ConfigError` where they were asked for and cannot be had."""
        self._settings = settings
        self._directory = Path(settings.model.path)
        self._kernels = choose_kernels(settings)
        self._cache: PackedCache | None = None
        bound_mb = settings.model.packed_cache_mb
        if self._kernels is not None and bound_mb and settings.model.load_format == "auto":
            with suppress(OSError):  # whoever reads the model's directory says what is wrong with it
                self._cache = PackedCache(
                    cache_directory(os.environ),
                    self._directory,
                    settings.model.dtype,
                    settings.model.weights,
                    self._kernels.library,
                    bound_mb << 20,
                )

    def find(self) -> PackedModel | None:
        """What was packed before of this very model."""
        model = self._cache.find() if self._cache is not None else None
        if model is not None:
            eos_of(self._directory, read_json(self._directory / "config.json"))  # tells what is odd about it
        return model

    def alone(self) -> AbstractAsyncContextManager[None]:
        """Nobody else makes the same one meanwhile."""
        return self._cache.alone() if self._cache is not None else nullcontext()

    def check_room(self) -> bool:
        """:func:`pool_size.check_room`, before a model is read."""
        with _lean_torch(self._settings):
            return check_room(self._settings)

    def load(self) -> tuple[PackedModel | LoadedModel, MakeAttention | None]:
        """The model, packed and kept where native kernels compute it; and what its attention runs on. Raises
        :class:`ConfigError` for a model that would not be served right."""
        settings = self._settings
        with _lean_torch(settings):
            model = _load(settings)
            if self._kernels is None:
                return model, _attention(settings, model)
            from microserve.services.engine.native.packing import pack_model

            try:
                packed = pack_model(model, self._kernels.library, settings.model.weights)
            except KernelUnavailable as error:
                go_without(settings, error)
                return model, None
            model.module.to("meta")  # what it had is packed
        return (self._cache.keep(packed) if self._cache is not None else packed), None


def make_runner(
    settings: Settings,
    model: PackedModel | LoadedModel,
    data: HeapData,
    num_blocks: int,
    attention: MakeAttention | None,
) -> NativeRunner | ModelRunner:
    """What computes ``model`` over the heap's data region. Where there is no memory or no thread for the
    native step, transformers does."""
    block_size = settings.kvcache.block_size
    if isinstance(model, PackedModel):
        from microserve.services.engine.native.runner import NativeRunner

        kernels = choose_kernels(settings)
        assert kernels is not None and isinstance(data, np.ndarray)
        engine = settings.engine
        max_rows = max(engine.max_num_batched_tokens, engine.max_num_seqs)
        try:
            return NativeRunner(
                model, kernels, data, num_blocks, block_size, threads=engine.threads, max_rows=max_rows
            )
        except KernelUnavailable as error:
            go_without(settings, error)
        revision = model.spec.revision
        with _lean_torch(settings):
            model = _load(settings)
        if model.spec.revision != revision:
            raise ConfigError("model.path: the model's files have changed meanwhile", field="model.path")
    from microserve.services.engine.model.runner import ModelRunner

    return ModelRunner(model, data, num_blocks, block_size, make_attention=attention)


def _load(settings: Settings) -> LoadedModel:
    from microserve.services.engine.model.model import load_model

    model = load_model(
        settings.model.path,
        dtype=settings.model.dtype,
        device=settings.engine.device,
        load_format=settings.model.load_format,
    )
    if settings.engine.cuda_exact and settings.engine.device != "cpu":
        from microserve.services.engine.model.device.exact import make_exact

        return make_exact(model)
    return model


def _attention(settings: Settings, model: LoadedModel) -> MakeAttention | None:
    import torch

    from microserve.services.engine.model.attention_choice import EXACT, choose_attention

    device, block_size = torch.device(settings.engine.device), settings.kvcache.block_size
    wanted = settings.engine.attention if model.numerics is None else EXACT
    return choose_attention(wanted, model.spec, block_size, device)


@contextmanager
def _lean_torch(settings: Settings) -> Iterator[None]:
    """torch and transformers are there, and import nothing more of themselves meanwhile."""
    from microserve.services.engine.lean_import import import_lean, without_compilers

    try:
        with uncollected():
            import_lean()
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("microserve"):
            raise
        raise RuntimeError(
            f"no {error.name}; an engine needs: pip install '.[engine]' in a checkout"
        ) from error
    import torch

    torch.set_num_threads(settings.engine.threads)
    with without_compilers():
        yield
