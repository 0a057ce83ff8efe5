"""Strategies: what they look like, their parameters, and the book of those that this router knows.

A strategy is an async generator function ``(mesh, request, *, parameters with defaults)`` that yields what a
``start_generate`` returns, or its chunks. It ends with the last chunk: what stands behind it is not run
(``finally`` is). Beside it may stand a plan, ``async def (mesh, *, parameters of the strategy)``, that runs
in the background (plan.py), and ``on_end``, ``def (mesh, request, outcome, *, parameters)``, which hears how
each request ended. Cancellation, deadlines, accounting and cleanup are the router's. Source files
are code: only operators may name them. Knows nothing of what a strategy does.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any, overload

import msgspec

from microserve.protocol.errors import ConfigError, StrategyError
from microserve.protocol.settings.faults import did_you_mean, wrong_value
from microserve.services.router.authoring.action.generating import Chunks
from microserve.services.router.authoring.mesh import Mesh
from microserve.services.router.authoring.view import MeshView
from microserve.services.router.request.outcome import Outcome
from microserve.services.router.request.request import Request
from microserve.services.router.source.files import read_files
from microserve.services.router.source.module import Run, forget, load, run_freely

StrategyFunction = Callable[..., Chunks]


PlanFunction = Callable[..., Coroutine[Any, Any, None]]
EndFunction = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Strategy:
    """A named strategy and the values of its parameters."""

    name: str
    function: StrategyFunction
    types: Mapping[str, Any]
    """Annotation of each parameter."""
    values: Mapping[str, Any]
    description: str
    plan: PlanFunction | None = None
    """Runs in the background while the strategy is in use (plan.py)."""
    on_end: EndFunction | None = None
    """Hears how each request ended."""
    version: int = 0
    """Of the control log (control.py); 0: the router came with it."""

    def __call__(self, mesh: Mesh, request: Request) -> Chunks:
        return self.function(mesh, request, **self.values)

    def start_plan(self, mesh: MeshView) -> Coroutine[Any, Any, None]:
        """With those of the strategy's values that the plan asks for; call only if there is a plan."""
        assert self.plan is not None, "the caller has looked"
        return self.plan(mesh, **self._wanted(self.plan))

    async def tell_end(self, mesh: MeshView, request: Request, outcome: Outcome) -> None:
        """With those of the strategy's values that ``on_end`` asks for; call only if there is one."""
        assert self.on_end is not None, "the caller has looked"
        self.on_end(mesh, request, outcome, **self._wanted(self.on_end))

    def _wanted(self, function: Callable[..., Any]) -> dict[str, Any]:
        wanted = inspect.signature(function).parameters
        return {name: value for name, value in self.values.items() if name in wanted}

    def bind(self, values: Mapping[str, Any]) -> Strategy:
        """With other parameter values. Raises :class:`ConfigError` for an unknown name or a wrong value."""
        bound = dict(self.values)
        for name, value in values.items():
            path = f"router.strategies.{self.name}.{name}"
            if name not in self.types:
                known = ", ".join(self.types) or "none"
                raise ConfigError(
                    f"{path}: strategy {self.name} has no such parameter (has: {known})"
                    f"{did_you_mean(name, self.types)}",
                    field=path,
                )
            try:
                bound[name] = msgspec.convert(value, self.types[name])
            except msgspec.ValidationError:
                raise ConfigError(wrong_value(path, self.types[name], value), field=path) from None
        return replace(self, values=bound)


@overload
def strategy(function: StrategyFunction, /) -> Strategy: ...
@overload
def strategy(
    *, plan: PlanFunction | None = None, on_end: EndFunction | None = None
) -> Callable[[StrategyFunction], Strategy]: ...
def strategy(
    function: StrategyFunction | None = None,
    /,
    *,
    plan: PlanFunction | None = None,
    on_end: EndFunction | None = None,
) -> Strategy | Callable[[StrategyFunction], Strategy]:
    """Decorator, ``@strategy`` or ``@strategy(plan=..., on_end=...)``: check the shape and make a
    :class:`Strategy` of the function's name.

    Raises :class:`StrategyError` when it is no async generator function, has a parameter without default or
    annotation, or a default that its own annotation refuses; when the plan is no async function, ``on_end``
    is one, or either wants a parameter that the strategy has not.
    """
    if function is None:
        return lambda function: _made(function, plan, on_end)
    return _made(function, plan, on_end)


def _made(function: StrategyFunction, plan: PlanFunction | None, on_end: EndFunction | None) -> Strategy:
    name = getattr(function, "__name__", repr(function))
    if not inspect.isasyncgenfunction(function):
        raise StrategyError(f"{name} must be an 'async def' with 'yield'")
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    named = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
    if len(positional) != 2 or len(positional) + len(named) != len(parameters):
        raise StrategyError(f"{name} must take (mesh, request, *, named parameters)")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise StrategyError(f"{name}: annotations cannot be read: {error}") from None
    types: dict[str, Any] = {}
    values: dict[str, Any] = {}
    for parameter in named:
        if parameter.default is parameter.empty or parameter.name not in hints:
            raise StrategyError(f"{name}: {parameter.name} needs a type and a default")
        types[parameter.name] = hints[parameter.name]
        try:
            values[parameter.name] = msgspec.convert(parameter.default, types[parameter.name])
        except (msgspec.ValidationError, TypeError) as error:
            raise StrategyError(f"{name}: default of {parameter.name}: {error}") from None
    if plan is not None:
        if not inspect.iscoroutinefunction(plan):
            raise StrategyError(f"{name}: the plan must be an 'async def' without 'yield'")
        _check_companion(name, "the plan", ("mesh",), plan, types)
    if on_end is not None:
        if inspect.iscoroutinefunction(on_end) or inspect.isasyncgenfunction(on_end):
            raise StrategyError(f"{name}: on_end must be a plain 'def': nobody waits for it")
        _check_companion(name, "on_end", ("mesh", "request", "outcome"), on_end, types)
    return Strategy(name, function, types, values, inspect.getdoc(function) or "", plan, on_end=on_end)


def _check_companion(
    name: str, what: str, given: tuple[str, ...], function: Callable[..., Any], types: Mapping[str, Any]
) -> None:
    """It takes what it is given, and parameters of the strategy by name."""
    parameters = list(inspect.signature(function).parameters.values())
    first = [p for p in parameters[: len(given)] if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(first) != len(given):
        raise StrategyError(f"{name}: {what} must take ({', '.join(given)}, *, parameters of the strategy)")
    for parameter in parameters[len(given) :]:
        if parameter.kind is not parameter.KEYWORD_ONLY or parameter.name not in types:
            raise StrategyError(f"{name}: {what}'s {parameter.name} is no parameter of the strategy")


def strategies_in(module: ModuleType) -> list[Strategy]:
    """The strategies that a module defines, or another module of its package (not those that it imports)."""
    found = {id(item): item for item in vars(module).values() if isinstance(item, Strategy)}
    return [
        each for each in found.values() if f"{each.function.__module__}.".startswith(f"{module.__name__}.")
    ]


def load_file(path: str, run: Run = run_freely) -> list[Strategy]:
    """Run an operator's file, or folder with an ``__init__.py``, by ``run``. Raises :class:`ConfigError` when
    it fails or has no strategy."""
    field, place = "router.strategy_files", Path(path)
    try:
        files = read_files(place)
    except ConfigError as error:
        raise ConfigError(error.detail, field=field) from None

    def file_of(name: str) -> str:
        return str(place / name) if place.is_dir() else path

    module_name = f"microserve_strategies.{place.stem}"
    forget(module_name)  # it may have been read before
    try:
        module = load(files, module_name, file_of, run)
    except Exception as error:
        # Whatever an operator's file raises is about the file; the cause keeps its traceback.
        raise ConfigError(f"{path}: {type(error).__name__}: {error}", field=field) from error
    found = strategies_in(module)
    if not found:
        raise ConfigError(f"{path}: defines no strategy", field=field)
    return found
