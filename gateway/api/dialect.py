"""``Dialect``: one API as the core meets it, without knowing which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from microserve.gateway.api.fields import RequestBody
from microserve.gateway.api.format import AnswerFormat, Answering
from microserve.gateway.request.request import GenerateRequest

B = TypeVar("B", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class Dialect(Generic[B]):
    """A pair of pure functions, and what they are between."""

    name: str
    """As the helpers know it."""
    body: type[B]
    into: Callable[[B], GenerateRequest]
    """Raises :class:`InvalidRequest` naming the body's field."""
    format: Callable[[Answering], AnswerFormat]
    prompt_field: str
    """The body's field that becomes the prompt."""
