"""Bytes -> a body of some API, in one pass, or :class:`InvalidRequest` naming the field.

Owns how wrong bodies are told, which unknown fields were logged, and the bounds of a body's shape, which hold
before anything is built. Knows no field by name; where unknown ones stand is ``unknown.py``'s.
"""

from __future__ import annotations

import re
from functools import cache
from itertools import accumulate
from typing import Any, Generic, NamedTuple, TypeVar, get_args

import msgspec
import structlog
from msgspec import Meta

from microserve.gateway.api import unknown
from microserve.protocol import log
from microserve.protocol.errors import InvalidRequest, located

SLICE_NBYTES = 1 << 20
NAMED_NBYTES = 1 << 16
"""Behind the begin of a slice that is too much: its member is looked for so far. Looking is slow."""

MAX_NAMED_CHARS = 128
"""Of a client's own word, in what it is told."""

# Names of unknown fields come from clients: the memory of them is bounded.
_MAX_WARNED_FIELDS = 64
_warned: set[str] = set()
_logger = structlog.get_logger()

_NOTHING: dict[str, str] = {}

R = TypeVar("R", bound=msgspec.Struct)


class Shape(NamedTuple):
    """What a body may hold at most, whatever its length."""

    max_values: int = 1 << 20
    """Of all its lists and maps together (``gateway.max_body_values``)."""
    max_depth: int = 64
    """Lists and maps within each other (``gateway.max_body_depth``)."""


class Parsed(NamedTuple, Generic[R]):
    """A body, and what of it was ignored."""

    body: R
    ignored: list[str]
    """Where unknown fields stand, as the client may be told."""

    @property
    def warnings(self) -> list[str]:
        return [f"ignored, for nobody knows them: {', '.join(self.ignored)}"] if self.ignored else []


def parse(body: bytes, kind: type[R], shape: Shape = Shape()) -> R:  # noqa: B008  (it is immutable)
    """As :func:`parsed`, for who tells nobody what was ignored."""
    return parsed(body, kind, shape).body


def parsed(body: bytes, kind: type[R], shape: Shape = Shape()) -> Parsed[R]:  # noqa: B008
    """Decode and check one body. Raises :class:`InvalidRequest` naming the field, for any bytes at all."""
    check_shape(body, shape)
    strict, tolerant = _decoders(kind)
    ignored: list[str] = []
    try:
        try:
            request: R = strict.decode(body)
        except msgspec.ValidationError as error:
            if "unknown field" not in str(error):
                raise
            request = tolerant.decode(body)
            ignored = unknown.told(body, kind)
            _warn_of(ignored)
    except msgspec.ValidationError as error:
        raise _refused(error) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        field = _broken_field(body, str(error))
        where = f" in {field[:128]!r}" if field else ""
        raise InvalidRequest(f"the body is not JSON{where}: {error}", field=field) from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    check_supported(request)
    for name, switch in getattr(kind, "off_by", _NOTHING).items():
        if getattr(request, name) and getattr(request, switch) != "none":
            raise InvalidRequest(f"{name} is not supported", field=name)
    return Parsed(request, ignored)


def check_supported(part: msgspec.Struct, where: str = "") -> None:
    """Raises :class:`InvalidRequest` for a field that is known and not supported, of a body or of a part of
    one (``where``, with a dot behind it)."""
    for name, allowed in _limited(type(part)).items():
        value = getattr(part, name)
        # In Python zero is false; in JSON it is not.
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            field = f"{where}{name}"
            raise InvalidRequest(f"{field} is not supported", field=field)


@cache
def _decoders(kind: type[R]) -> tuple[msgspec.json.Decoder[R], msgspec.json.Decoder[R]]:
    """One that stops at a field that nobody knows, which is rare, and one that skips it."""
    return msgspec.json.Decoder(unknown.strict(kind)), msgspec.json.Decoder(kind)


@cache
def _limited(kind: type[msgspec.Struct]) -> dict[str, list[Any]]:
    """Fields that are known and not supported, and the values that ask for nothing (``fields.only``)."""
    found = {}
    for field in msgspec.structs.fields(kind):
        for each in get_args(field.type):
            if isinstance(each, Meta) and each.extra_json_schema and "enum" in each.extra_json_schema:
                found[field.name] = each.extra_json_schema["enum"]
    return found


def _warn_of(fields: list[str]) -> None:
    for field in fields:
        if len(_warned) >= _MAX_WARNED_FIELDS:
            return
        if field not in _warned:
            _warned.add(field)
            _logger.warning(log.HTTP_FIELD_IGNORED, field=field)


# --- shape -----------------------------------------------------------------------------------------

_ESCAPED = re.compile(rb"\\.", re.DOTALL)
_NO_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_STEP = {ord("["): 1, ord("{"): 1, ord("]"): -1, ord("}"): -1}


def check_shape(body: bytes, shape: Shape) -> None:
    """Raises :class:`InvalidRequest` for more values in lists and maps, or a deeper nesting, than is allowed.

    Counts commas and brackets outside of texts; nothing is built, and the first excess ends it.
    """
    opened = body.count(b"[") + body.count(b"{")
    if opened <= shape.max_depth and opened + body.count(b",") <= shape.max_values:
        return  # a bound of the bounds: texts may have these characters, too
    values = depth = 0
    in_text, cut = False, b""
    for begin in range(0, len(body), SLICE_NBYTES):
        part = _ESCAPED.sub(b"", cut + body[begin : begin + SLICE_NBYTES])
        cut = b"\\" if part.endswith(b"\\") else b""
        pieces = part.split(b'"')
        outside = b"".join(pieces[in_text::2])
        in_text ^= len(pieces) % 2 == 0
        brackets = outside.translate(None, _NO_BRACKETS)
        values += outside.count(b",") + brackets.count(b"[") + brackets.count(b"{")
        if values > shape.max_values:
            field = _member_at(body, begin + NAMED_NBYTES)
            raise InvalidRequest(
                f"the body has more than {shape.max_values} values in its lists and maps", field=field
            )
        if brackets:
            depths = list(accumulate(map(_STEP.__getitem__, brackets), initial=depth))
            depth = depths[-1]
            if max(depths) > shape.max_depth:
                field = _member_at(body, begin + NAMED_NBYTES)
                raise InvalidRequest(
                    f"the body is nested deeper than {shape.max_depth} lists and maps", field=field
                )


# --- where it is wrong -------------------------------------------------------------------------------

# A text that is cut off is a token, too: else each quotation mark in it had the rest looked through again.
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"?|[\[\]{}:]', re.DOTALL)


def _broken_field(body: bytes, error: str) -> str | None:
    """The member of the body in which the byte lies that is none of JSON's (``NaN``, say)."""
    _, found, offset = error.partition("(byte ")
    return _member_at(body, int(offset.rstrip(")"))) if found else None


def _member_at(body: bytes, offset: int) -> str | None:
    """The last member of the body that begins before ``offset``; None before the first."""
    depth, name, field = 0, b"", None
    for match in _TOKEN.finditer(body, 0, offset):
        token = match[0]
        if token in b"[{":
            depth += 1
        elif token in b"]}":
            depth -= 1
        elif depth == 1 and token == b":":
            field = name
        elif depth == 1:
            name = token
    if field is None:
        return None
    try:
        return msgspec.json.decode(field, type=str)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        return None


_UNKNOWN_VALUE = re.compile(r"Invalid (?:enum )?value (.*)", re.DOTALL)
"""As msgspec says it of a word that is none of those that a field, or the type of an object, may have."""


def _refused(error: msgspec.ValidationError) -> InvalidRequest:
    path, message = located(error)
    if found := _UNKNOWN_VALUE.fullmatch(message):
        message = f"{found[1][:MAX_NAMED_CHARS]} is not supported"
    return InvalidRequest(f"{path}: {message}" if path else message, field=path or None)
