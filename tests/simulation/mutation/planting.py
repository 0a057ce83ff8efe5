"""How a bug is planted: a name for the table, and what undoes it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

Plant = Callable[[ExitStack], None]
MUTATIONS: dict[str, Callable[[], ExitStack]] = {}


def mutation(plant: Plant) -> Plant:
    """Register; the function's docstring is what the table says of it."""

    def planted() -> ExitStack:
        stack = ExitStack()
        plant(stack)
        return stack

    MUTATIONS[(plant.__doc__ or plant.__name__).strip().rstrip(".")] = planted
    return plant


def replace(stack: ExitStack, owner: type, name: str, new: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, new))
