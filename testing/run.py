"""How a test in a mesh in memory is run: a plain function for whatever runs tests. Needs no pytest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

from microserve.protocol.messages.strategy.control import Scalar
from microserve.services.router.authoring.definition import Strategy
from microserve.testing.mesh import Engine, MeshInMemory

Story = Callable[..., Coroutine[Any, Any, None]]


def in_memory(
    strategy: Strategy | str | Path,
    *engines: Engine,
    parameters: Mapping[str, Scalar] | None = None,
    num_routers: int = 1,
    num_blocks: int = 4096,
    may_be_mistaken: bool = False,
) -> Callable[[Story], Callable[..., None]]:
    """Decorator: run ``async def test(mesh, ...)`` in a mesh of its own; other arguments are the test
    runner's. The arguments are those of :class:`MeshInMemory`; a file is looked for beside the test's.

    A mistake of the strategy fails the test, though its requests are served; not with ``may_be_mistaken``.
    """

    def decorate(story: Story) -> Callable[..., None]:
        chosen = strategy
        if (
            not isinstance(chosen, Strategy)
            and (beside := Path(inspect.getfile(story)).parent / chosen).exists()
        ):
            chosen = beside

        @functools.wraps(story)
        def test(*args: Any, **others: Any) -> None:
            with MeshInMemory(
                chosen, *engines, parameters=parameters, num_routers=num_routers, num_blocks=num_blocks
            ) as mesh:
                mesh.run(story(mesh, *args, **others))
                assert may_be_mistaken or mesh.mistakes == [], "\n".join(mesh.mistakes)

        signature = inspect.signature(story)
        [_, *rest] = signature.parameters.values()
        made: Any = test  # a runner reads what it is to pass from here
        made.__signature__ = signature.replace(parameters=rest, return_annotation=None)
        del made.__wrapped__
        return test

    return decorate
