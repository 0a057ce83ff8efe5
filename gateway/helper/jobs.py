"""Questions of a gateway to its helper and their answers, as they go through a pipe.

Owns the framing: two lengths (u32, little-endian), a msgpack message, raw bulk. Nothing here is an interface:
both ends are one release.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

MAX_MESSAGE_NBYTES = (1 << 32) - 1
HEAD = struct.Struct("<II")


class Setup(msgspec.Struct, frozen=True):
    """What a helper is told once, at its start."""

    directory: str
    """Of the model."""
    model: str
    template_cpu_s: float
    max_values: int
    max_depth: int
    parse_control_tokens: bool = False
    memory_mb: int = 256
    """That the process may take."""


class Asked(msgspec.Struct, frozen=True):
    """Of a chat template."""

    messages: Sequence[Mapping[str, Any]]
    tools: Sequence[Mapping[str, Any]] | None
    options: Mapping[str, Any]
    """The template's own variables."""


class Render(msgspec.Struct, frozen=True, tag=1, array_like=True):
    """The chat template's text for these messages -> ``Rendered``."""

    asked: bytes
    """JSON of :class:`Asked`: numbers in arguments and tools may be too large for msgpack."""


class Prepare(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Bulk: a body, and what it needs. Parse it, check it, tokenise its prompts -> ``Prepared``, or
    ``Answered`` by itself, or ``Wanting``."""

    kind: str
    """Of ``gateway/dialects.py``."""
    max_model_len: int
    """As ``vocab_size``: 0 while no router has said."""
    vocab_size: int
    kept: dict[str, int] = {}
    """What was kept under these names stands behind the body: so many bytes of each."""
    has_kept: bool = False
    """All that the body needs is there."""
    adapters: list[str] = []
    """Names that a body may have as its model, besides the model's."""


class CheckGrammar(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """Compile it, or say what cannot be enforced -> ``CheckedGrammar``."""

    kind: str
    text: str
    is_strict: bool


class Rendered(msgspec.Struct, frozen=True, tag=1, array_like=True):
    text: str


class Prepared(msgspec.Struct, frozen=True, tag=2, array_like=True):
    """Bulk: the prompts' ids, u32 little-endian, one prompt behind the other, and the request's context."""

    request: bytes
    """JSON of the request without its prompt."""
    lengths: list[int]
    """Tokens of each prompt; none when it is refused for what only the gateway knows (the model's name)."""


class Answered(msgspec.Struct, frozen=True, tag=3, array_like=True):
    """Bulk: the reply's JSON."""

    warnings: list[str]


class Refused(msgspec.Struct, frozen=True, tag=4, array_like=True):
    code: str
    """Of ``protocol.errors``."""
    detail: str
    field: str | None
    retry_after_s: float


class CheckedGrammar(msgspec.Struct, frozen=True, tag=5, array_like=True):
    text: str
    """What engines are sent."""
    warnings: list[str]


class Wanting(msgspec.Struct, frozen=True, tag=6, array_like=True):
    """The body needs what was kept under these names; asked again with it, it will be prepared."""

    names: dict[str, str]
    """With the field that says so."""


Job = Render | Prepare | CheckGrammar
Result = Rendered | Prepared | Answered | Refused | CheckedGrammar | Wanting

encode = msgspec.msgpack.Encoder().encode
JOBS: msgspec.msgpack.Decoder[Job] = msgspec.msgpack.Decoder(Job)
RESULTS: msgspec.msgpack.Decoder[Result] = msgspec.msgpack.Decoder(Result)
