"""Fields that no type of ours knows: where they stand in a body, as a client may be told.

Owns types that stop at such a field (each made once, from the types that parse) and the bounds of what is
told. Names come from clients: few of them, short, printable.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache, reduce
from operator import or_
from types import UnionType
from typing import Annotated, Any, NamedTuple, TypeVar, Union, cast, get_args, get_origin

import msgspec

MAX_TOLD = 8
"""Names of one request; beyond them there is an ellipsis."""
MAX_NAME_CHARS = 64
_UNPRINTABLE = re.compile(r"[^\x20-\x7e]")
_CONTAINERS = (list, dict, tuple)

R = TypeVar("R", bound=msgspec.Struct)


@cache
def strict(kind: type[R]) -> type[R]:
    """``kind``, and every type within it, refusing fields that it does not know."""
    changed = [
        (field.name, _strict_type(field.type), *_default_of(field))
        for field in msgspec.structs.fields(kind)
        if _strict_type(field.type) is not field.type
    ]
    config = kind.__struct_config__
    made = msgspec.defstruct(
        kind.__name__,
        changed,
        bases=(kind,),
        forbid_unknown_fields=True,
        kw_only=True,
        tag=config.tag,
        tag_field=config.tag_field,
    )
    return cast(type[R], made)


def _default_of(field: msgspec.structs.FieldInfo) -> tuple[Any, ...]:
    """As ``defstruct`` takes it behind name and type."""
    if field.default_factory is not msgspec.NODEFAULT:
        return (msgspec.field(default_factory=field.default_factory),)
    return () if field.default is msgspec.NODEFAULT else (field.default,)


def _strict_type(kind: Any) -> Any:
    """As ``kind``; itself where there is nothing to change in it."""
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return strict(kind)
    arguments = get_args(kind)
    origin = get_origin(kind)
    if origin not in (Annotated, Union, UnionType, *_CONTAINERS):
        return kind
    changed = tuple(map(_strict_type, arguments))
    if all(new is old for new, old in zip(changed, arguments, strict=True)):
        return kind
    if origin is Annotated:
        return Annotated[(changed[0], *kind.__metadata__)]
    return reduce(or_, changed) if origin in (Union, UnionType) else origin[changed]


def told(body: bytes, kind: type[msgspec.Struct]) -> list[str]:
    """Where the unknown fields of a body stand that ``kind`` has taken: ``messages[].colour``, once for all
    messages."""
    names: list[str] = []
    for path in _unknown(msgspec.json.decode(body), _within(kind), ""):
        name = _UNPRINTABLE.sub("?", path)
        if name in names:
            continue
        if len(names) == MAX_TOLD:
            return [*names, "..."]
        names.append(name)
    return names


class _Within(NamedTuple):
    """What a type has in it that may have fields: one of these objects, or a list of such."""

    structs: tuple[type[msgspec.Struct], ...] = ()
    items: _Within | None = None


_NOTHING = _Within()


def _within(kind: Any) -> _Within:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _within(arguments[0])
    if origin in (Union, UnionType):
        return reduce(_either, map(_within, arguments))
    if origin is list:
        items = _within(arguments[0])
        return _NOTHING if items is _NOTHING else _Within(items=items)
    return _Within((kind,)) if isinstance(kind, type) and issubclass(kind, msgspec.Struct) else _NOTHING


def _either(one: _Within, other: _Within) -> _Within:
    if _NOTHING in (one, other):
        return one if other is _NOTHING else other
    items = one.items or other.items
    if one.items and other.items:
        items = _either(one.items, other.items)
    return _Within(one.structs + other.structs, items)


class _Known(NamedTuple):
    """The fields of one type."""

    tag_field: str | None
    tag: str | int | None
    fields: dict[str, _Within]


@cache
def _known(kind: type[msgspec.Struct]) -> _Known:
    """Once for each type: a body may have thousands of its objects."""
    config = kind.__struct_config__
    fields = {field.encode_name: _within(field.type) for field in msgspec.structs.fields(kind)}
    return _Known(config.tag_field, config.tag, fields)


def _unknown(value: Any, within: _Within, path: str) -> Iterator[str]:
    """Paths of fields in ``value`` that ``within`` does not know."""
    if isinstance(value, list):
        if within.items is not None:
            where = f"{path}[]"
            for each in value:
                yield from _unknown(each, within.items, where)
    elif isinstance(value, dict):
        for kind in within.structs:
            yield from _unknown_of(value, _known(kind), path)


def _unknown_of(value: dict[str, Any], known: _Known, path: str) -> Iterator[str]:
    if known.tag is not None and value.get(known.tag_field or "") != known.tag:
        return  # another one of a union
    for name, each in value.items():
        within = known.fields.get(name)
        if within is _NOTHING:
            continue
        where = f"{path}.{name[:MAX_NAME_CHARS]}" if path else name[:MAX_NAME_CHARS]
        if within is not None:
            yield from _unknown(each, within, where)
        elif name != known.tag_field or known.tag is None:
            yield where
