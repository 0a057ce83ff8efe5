"""``Dialect``: one API as the core meets it, without knowing which."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from microserve.gateway.api.fields import RequestBody
from microserve.gateway.api.format import AnswerFormat, Answering
from microserve.gateway.request.request import GenerateRequest

B = TypeVar("B", bound=RequestBody)


@dataclass(frozen=True, slots=True)
class Recall(Generic[B]):
    """An API whose requests may go on from answers that were kept."""

    names: Callable[[B], Mapping[str, str]]
    """Of what a body needs, with the field that says so. Raises :class:`InvalidRequest`."""
    into: Callable[[B, Mapping[str, bytes]], GenerateRequest]
    """As :attr:`Dialect.into`, with what was kept under these names."""


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
    recall: Recall[B] | None = None

    def needs(self, body: B) -> Mapping[str, str]:
        """As :attr:`Recall.names`."""
        return {} if self.recall is None else self.recall.names(body)

    def request(self, body: B, kept: Mapping[str, bytes]) -> GenerateRequest:
        """Raises :class:`InvalidRequest` naming the body's field."""
        return self.into(body) if self.recall is None else self.recall.into(body, kept)
