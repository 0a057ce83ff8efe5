"""Which facts about a request the operator lets strategies see, and their values in one HTTP request.

Owns the allow-list (``gateway.attributes``) and which of it is for strategies alone (``private_attributes``).
What comes is bounded as protocol/messages/request/attributes.py says. Knows nothing of what strategies do
with it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from microserve.gateway.request.request import GenerateRequest
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.protocol.messages.request.attributes import MAX_ATTRIBUTES, MAX_NAME_CHARS, MAX_VALUE_CHARS

FIELDS = ("user", "prompt_cache_key", "safety_identifier", "service_tier")
"""Labels that may be attributes."""
METADATA, HEADER = "metadata", "header"
SECRET = frozenset(("authorization", "cookie", "proxy-authorization", "x-api-key"))
"""Headers that no strategy sees."""
_TOKEN = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
"""A header's name, in lower case (RFC 9110)."""


class Headers(Protocol):
    def text_header(self, name: bytes) -> str | None: ...


@dataclass(frozen=True, slots=True)
class Attributes:
    """The allow-list of one gateway."""

    fields: tuple[str, ...] = ()
    metadata: tuple[str, ...] = ()
    """Keys of it."""
    all_metadata: bool = False
    headers: tuple[str, ...] = ()
    private: frozenset[str] = frozenset()
    """Names as they are listed; ``metadata`` is all of it."""

    @classmethod
    def of(cls, allowed: Sequence[str], private: Sequence[str] = ()) -> Attributes:
        """Raises :class:`ConfigError` for what is none."""
        fields: list[str] = []
        metadata: list[str] = []
        headers: list[str] = []
        for name in dict.fromkeys(allowed):
            kind, dot, rest = name.partition(".")
            if name in FIELDS:
                fields.append(name)
            elif kind == METADATA and dot and 0 < len(name) <= MAX_NAME_CHARS:
                metadata.append(rest)
            elif kind == HEADER and _TOKEN.fullmatch(rest) and len(name) <= MAX_NAME_CHARS:
                if rest in SECRET:
                    raise _wrong("attributes", name, "is a secret of the client's")
                headers.append(rest)
            elif name != METADATA:
                raise _wrong(
                    "attributes",
                    name,
                    f"is none of {', '.join(FIELDS)}, {METADATA}, {METADATA}.KEY, {HEADER}.NAME (lower case)",
                )
        if len(fields) + len(metadata) + len(headers) > MAX_ATTRIBUTES:
            raise _wrong("attributes", "", f"{len(allowed)} of them, at most {MAX_ATTRIBUTES}")
        all_metadata = METADATA in allowed
        for name in private:
            if name in allowed or name in FIELDS:  # whoever lets less through need not say so twice
                continue
            if not (all_metadata and name.startswith(f"{METADATA}.")):
                raise _wrong("private_attributes", name, "is not in gateway.attributes")
        return cls(tuple(fields), tuple(metadata), all_metadata, tuple(headers), frozenset(private))

    def read(self, request: GenerateRequest, headers: Headers) -> dict[str, str]:
        """Values by name, of those that the request has. Raises :class:`InvalidRequest` naming the field."""
        found: dict[str, str] = {}
        for label in self.fields:
            if (value := request.labels.get(label)) is not None:
                found[label] = _text(request.name_of(label), value)
        if self.all_metadata or self.metadata:
            given = _mapping(request.labels.get(METADATA))
            for key in given if self.all_metadata else self.metadata:
                if (value := given.get(key)) is not None:
                    name = f"{METADATA}.{key}"
                    if len(name) > MAX_NAME_CHARS:
                        most = MAX_NAME_CHARS - len(METADATA) - 1
                        raise InvalidRequest(f"metadata: a key has at most {most} characters", field=METADATA)
                    found[name] = _text(name, value)
        for header in self.headers:
            if (value := headers.text_header(header.encode())) is not None:
                found[f"{HEADER}.{header}"] = _text(header, value)
        if len(found) > MAX_ATTRIBUTES:
            raise InvalidRequest(f"metadata: more than {MAX_ATTRIBUTES} attributes", field=METADATA)
        return found

    def told(self, attributes: Mapping[str, str]) -> dict[str, str | None]:
        """As logs have them: None stands for a value that is for strategies alone."""
        return {name: None if self._is_private(name) else value for name, value in attributes.items()}

    def _is_private(self, name: str) -> bool:
        return name in self.private or name.partition(".")[0] in self.private


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a text", field=name)
    if len(value) > MAX_VALUE_CHARS:
        raise InvalidRequest(f"{name} has {len(value)} characters, at most {MAX_VALUE_CHARS}", field=name)
    return value


def _mapping(metadata: Any) -> Mapping[str, Any]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict):
        raise InvalidRequest("metadata must be an object", field=METADATA)
    return metadata


def _wrong(setting: str, name: str, what: str) -> ConfigError:
    field = f"gateway.{setting}"
    return ConfigError(f"{field}: {f'{name!r} ' if name else ''}{what}", field=field)
