"""How an engine gets torch and transformers: without what it never uses of them, which is more than half.

    compilers     torch._dynamo, and through it inductor, sympy and triton: wanted for marks that tell a
                  compiler what to leave alone, and for checks of sizes that only a compiler does not know.
                  Nothing is compiled here, so while transformers is imported and a model is made,
                  placeholders give marks that mark nothing
    distribution  torch.distributed.tensor and its kin: transformers does without where torch says that it was
                  built without
    scanning      transformers reads all of its model files to know their names, twice; once is enough

A placeholder that is asked for anything else makes room for the real module, at once and for good: another
version of transformers costs time and breaks nothing. Owns that; knows nothing of models.
"""

from __future__ import annotations

import importlib
import operator
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from importlib.abc import MetaPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import structlog

from microserve.protocol import log

_NEEDED = ("transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama")
"""What would be imported when a model is loaded: all kinds that are served want the same."""

_logger = structlog.get_logger()


def import_lean() -> None:
    """Import torch and transformers so. Raises ``ModuleNotFoundError`` where there are none."""
    with without_compilers(), _without_distribution():
        _import_names()
        for name in _NEEDED:
            importlib.import_module(name)


@contextmanager
def without_compilers() -> Iterator[None]:
    """torch imports none of its compilers meanwhile, unless one is really wanted."""
    importlib.import_module("torch")
    placeholders = _Placeholders()
    try:
        yield
    finally:
        placeholders.make_room()


class _Placeholders(MetaPathFinder):
    """In the places of modules, for the few things that are wanted of them."""

    def __init__(self) -> None:
        self._modules: dict[str, ModuleType] = {}
        for name, gives in _GIVEN.items():
            if name not in sys.modules:
                module = self._modules[name] = ModuleType(name)
                vars(module).update(gives, __path__=[], __getattr__=partial(self._give_real, name))
                sys.modules[name] = module
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)
        sys.meta_path.insert(0, self)

    def make_room(self) -> None:
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        for name, module in self._modules.items():
            if sys.modules.get(name) is module:
                del sys.modules[name]
            parent, _, child = name.rpartition(".")
            if vars(sys.modules.get(parent, module)).get(child) is module:
                delattr(sys.modules[parent], child)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> None:
        """Finds nothing; whoever imports a module that is in one of ours wants the real one."""
        parent, _, child = fullname.rpartition(".")
        if parent in self._modules:
            path += self._give_real(parent, "__path__", child)

    def _give_real(self, module: str, name: str, wanted: str = "") -> Any:
        if name.startswith("__") and not wanted:  # Python asks every module for some
            raise AttributeError(name)
        self.make_room()
        _logger.warning(log.IMPORT_NOT_LEAN, module=module, wanted=wanted or name)
        return getattr(importlib.import_module(module), name)


def _mark(function: Any = None, *_: Any, **__: Any) -> Any:
    """``@mark`` and ``@mark(...)``."""
    return function if callable(function) else _mark


_INDEXING, _INDEXING_MODULE = "TransformGetItemToIndex", "torch._dynamo._trace_wrapped_higher_order_op"


def _indexing() -> Any:
    """For masks that are computed by ``vmap``, which ours never are: the real one, when it is wanted."""
    return getattr(importlib.import_module(_INDEXING_MODULE), _INDEXING)()


_GIVEN: Mapping[str, Mapping[str, Any]] = {
    "torch._dynamo": {"disable": _mark, "allow_in_graph": _mark, "assume_constant_result": _mark},
    _INDEXING_MODULE: {_INDEXING: _indexing},
    # Of sizes that are numbers, as all are here, it is known what they are.
    "torch.fx.experimental.symbolic_shapes": {
        **dict.fromkeys(("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious"), bool),
        **dict.fromkeys(("statically_known_true", "definitely_true"), bool),
        "is_nested_int": lambda size: False,
        "has_guarding_hint": lambda size: True,
        "guarding_hint_or_throw": lambda size: size,
        "sym_and": lambda *each: all(each),
        "sym_or": lambda *each: any(each),
        "sym_eq": operator.eq,
    },
    "sympy": {"Basic": type("Basic", (), {})},
}


@contextmanager
def _without_distribution() -> Iterator[None]:
    distributed: Any = importlib.import_module("torch.distributed")
    is_available = distributed.is_available
    distributed.is_available = lambda: False
    try:
        yield
    finally:
        distributed.is_available = is_available


def _import_names() -> None:
    """``transformers`` and ``transformers.models``: what the first has read serves the second."""
    importlib.import_module("transformers")
    utils: Any = importlib.import_module("transformers.utils.import_utils")
    read: Callable[[Path], Any] = utils.create_import_structure_from_path

    def read_once(path: str | Path) -> Any:
        path = Path(path)
        return read(path.parent if path.name == "__init__.py" else path)  # the same key as the first time

    utils.create_import_structure_from_path = read_once
    try:
        importlib.import_module("transformers.models")
    finally:
        utils.create_import_structure_from_path = read
