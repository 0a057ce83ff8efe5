"""Modules of a source: made, run by whoever bounds that, found by relative imports of a package, forgotten.

The files of a package are never on disk where they are run, so a finder of their own gives them to Python.
"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.abc import InspectLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec, spec_from_loader
from types import CodeType, ModuleType
from typing import NamedTuple

from microserve.protocol.strategy_source import TOP

Run = Callable[[Callable[[], None]], None]
"""Runs a source's own code."""


def run_freely(code: Callable[[], None]) -> None:
    """For as long as it likes."""
    code()


class _Source(NamedTuple):
    text: str
    file: str
    """What tracebacks say."""
    is_package: bool


class _Sources(InspectLoader, MetaPathFinder):
    """All that are loaded now, by name of module."""

    def __init__(self) -> None:
        self.known: dict[str, _Source] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        source = self.known.get(fullname)
        if source is None:
            return None
        return spec_from_loader(fullname, self, origin=source.file, is_package=source.is_package)

    def is_package(self, fullname: str) -> bool:
        return self.known[fullname].is_package

    def get_source(self, fullname: str) -> str:
        return self.known[fullname].text

    def get_code(self, fullname: str) -> CodeType:
        source = self.known[fullname]
        code: CodeType = compile(source.text, source.file, "exec", dont_inherit=True)
        return code


_sources = _Sources()


def load(
    files: Mapping[str, str], name: str, file_of: Callable[[str], str], run: Run = run_freely
) -> ModuleType:
    """Run a source's files (strategy_source.py) as the module ``name``; ``file_of`` says what tracebacks call
    a file of it. Raises whatever the source raises; then nothing of it is left."""
    if _sources not in sys.meta_path:
        sys.meta_path.append(_sources)
    above = name.partition(".")[0]  # Python asks for it when a package imports its own modules
    if above not in sys.modules:
        sys.modules[above] = ModuleType(above)
    for each, text in files.items():
        parts = each.removesuffix(".py").removesuffix(TOP.removesuffix(".py")).strip("/").split("/")
        module, file = ".".join([name, *filter(None, parts)]), file_of(each)
        is_package = each.endswith(TOP) and (each != TOP or len(files) > 1)
        _sources.known[module] = _Source(text, file, is_package)
        linecache.cache[file] = (len(text), None, text.splitlines(keepends=True), file)  # for tracebacks
    try:
        spec = _sources.find_spec(name, None)
        assert spec is not None, "it was put there above"
        made = module_from_spec(spec)
        made.__file__ = file_of(TOP)
        sys.modules[name] = made  # dataclasses and the like look their module up by name
        # Nothing of ours in between: an overseer breaks off only what it has called itself.
        run(partial(exec, _sources.get_code(name), made.__dict__))
    except BaseException:
        forget(name)
        raise
    return made


def forget(name: str) -> None:
    """The module ``name`` and all of its package."""
    for each in [each for each in _sources.known if each == name or each.startswith(f"{name}.")]:
        linecache.cache.pop(_sources.known.pop(each).file, None)
        sys.modules.pop(each, None)
