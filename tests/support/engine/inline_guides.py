"""Guides made at once, in the caller's thread, by the real library: for rigs that are stepped by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from microserve.protocol.errors import MeshError
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.guidance.guide import Guide
from microserve.services.engine.guidance.matching import GrammarCompiler, GrammarMatcher
from tests.support.engine.core_mesh import Mesh


@dataclass
class Made:
    """A ``Guiding`` that is done when ``is_done`` says so."""

    guide: Guide | None
    error: MeshError | None = None
    is_done: bool = True
    is_cancelled: bool = False

    def is_overdue(self, now: float) -> bool:
        return False

    def cancel(self) -> None:
        self.is_cancelled = True


class InlineGuides:
    """The ``Guides`` of an engine. ``is_late``: no guide is done before ``finish``."""

    def __init__(self, compiler: GrammarCompiler, vocab_size: int, *, is_late: bool = False) -> None:
        self._compiler, self._vocab_size, self.is_late = compiler, vocab_size, is_late
        self.made: list[Made] = []
        self._compiled: dict[bytes, GrammarMatcher] = {}

    def prepare(
        self, params: SamplingParams, output: Sequence[int], ends: frozenset[int], on_done: Callable[[], None]
    ) -> Made:
        assert params.grammar is not None
        key = json.dumps([params.grammar.kind, params.grammar.text]).encode()
        matcher = self._compiled.setdefault(key, self._compiler.compile(params.grammar))
        guide = Guide(matcher.fork(), params, ends, self._vocab_size)
        guide.follow(output)
        self.made.append(Made(guide, is_done=not self.is_late))
        return self.made[-1]

    def finish(self) -> None:
        for made in self.made:
            made.is_done = True

    def close(self) -> None: ...


class GuidedMesh(Mesh):
    def __init__(self, guides: InlineGuides, **options: int) -> None:
        self.guides = guides
        super().__init__(**options)


@cache
def compiler_for(directory: Path, vocab_size: int, ends: frozenset[int]) -> GrammarCompiler:
    return GrammarCompiler(directory, vocab_size, ends)


def schema(text: object, **fields: object) -> Grammar:
    return Grammar(kind="json_schema", text=json.dumps(text), **fields)  # type: ignore[arg-type]
