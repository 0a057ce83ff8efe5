"""For pytest: ``from microserve.testing.fixtures import make_mesh``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any, Protocol

import pytest

from microserve.testing.mesh import MeshInMemory


class MakeMesh(Protocol):
    """The arguments of :class:`MeshInMemory`."""

    def __call__(self, *args: Any, **options: Any) -> MeshInMemory: ...


@pytest.fixture
def make_mesh() -> Iterator[MakeMesh]:
    """A mesh in memory, closed at the test's end: ``mesh = make_mesh("balanced", Engine("a"))``, and then
    ``answer = mesh.run(mesh.ask(prompt_tokens=100))``. One in a test."""
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> MeshInMemory:
            return stack.enter_context(MeshInMemory(*args, **options))

        yield make
