"""Types of fields that the bodies of several APIs have, with their bounds; and what is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta

MAX_MESSAGES = 4096
"""A template costs time for each; no conversation has so many."""
MAX_NAME_CHARS = 256
MAX_STOP_STRINGS = 16
MAX_TOOLS = 128
MAX_DESCRIPTION_CHARS = 1 << 16
MAX_COUNTED_TOKENS = 1 << 20
"""Beyond any context; bounds the work of a question that counts tokens."""

Name = Annotated[str, Meta(max_length=MAX_NAME_CHARS)]
StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
StopStrings = Annotated[list[StopString], Meta(max_length=MAX_STOP_STRINGS)]
FunctionName = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_.\-]{1,128}$(?!\n)")]
"""In Python a ``$`` matches before a last line break, too."""


def only(*values: Any) -> Meta:
    """Of a field that is not supported: null, and these values, ask for nothing and are let through."""
    # By equality alone, which is what typing keeps annotations by, 1 would be true and 0 false.
    return Meta(extra_json_schema={"enum": [None, *values]}, extra={"only": repr(values)})


Unsupported = Annotated[Any, only()]
OnlyFalse = Annotated[Any, only(False)]
OnlyTrue = Annotated[Any, only(True)]
Label = Annotated[Any, Meta(description="Changes no token: for strategies where gateway.attributes has it.")]
Ignored = Annotated[Any, Meta(description="Changes no token: accepted and ignored.")]
Told = Annotated[Any, Meta(description="Changes no token: ignored, and told in x-microserve-warning.")]


class RequestBody(msgspec.Struct, kw_only=True):
    """What asks for an answer of a model, in any API."""

    off_by: ClassVar[dict[str, str]] = {}
    """Fields that are refused unless empty, or the other one is ``"none"``: then no answer could use them."""

    model: Name
