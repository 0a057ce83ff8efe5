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
from typing import Annotated, Any, TypeVar, Union, cast, get_args, get_origin

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
    for path in _unknown(msgspec.json.decode(body), kind, ""):
        name = _UNPRINTABLE.sub("?", path)
        if name in names:
            continue
        if len(names) == MAX_TOLD:
            return [*names, "..."]
        names.append(name)
    return names


def _unknown(value: Any, kind: Any, path: str) -> Iterator[str]:
    """Paths of fields in ``value`` that ``kind`` does not know."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _unknown(value, get_args(kind)[0], path)
    elif origin in (Union, UnionType):
        for each in get_args(kind):
            yield from _unknown(value, each, path)
    elif origin is list and isinstance(value, list):
        for each in value:
            yield from _unknown(each, get_args(kind)[0], f"{path}[]")
    elif isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        config = kind.__struct_config__
        if config.tag is not None and value.get(config.tag_field) != config.tag:
            return  # another one of a union
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(kind)}
        for name, each in value.items():
            where = f"{path}.{name[:MAX_NAME_CHARS]}" if path else name[:MAX_NAME_CHARS]
            if name in fields:
                yield from _unknown(each, fields[name], where)
            elif name != config.tag_field or config.tag is None:
                yield where
