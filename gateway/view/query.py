"""Which of the last requests somebody wants to see, and in which order."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from operator import attrgetter
from typing import Final, Protocol

import msgspec

from microserve.gateway.view.forms import RequestForm
from microserve.gateway.view.requests import Kept
from microserve.protocol.errors import InvalidRequest

NEWEST, SLOWEST, FIRST_TOKEN = ORDERS = ("newest", "slowest", "first_token")
MAX_LIMIT: Final = 1000
DEFAULT_LIMIT: Final = 100
MAX_VALUE_CHARS: Final = 256


class Chosen(Protocol):
    """What a request is chosen by."""

    @property
    def wall_s(self) -> float: ...
    @property
    def key(self) -> str: ...
    @property
    def strategy(self) -> str: ...
    @property
    def engines(self) -> Collection[str]: ...
    @property
    def code(self) -> str: ...


class Query(msgspec.Struct, frozen=True):
    """An empty field asks for nothing in particular."""

    order: str = NEWEST
    limit: int = DEFAULT_LIMIT
    min_s: float = 0.0
    """Of wall time."""
    key: str = ""
    strategy: str = ""
    engine: str = ""
    """That took part."""
    code: str = ""
    """Of its error; ``any``: of any."""

    @property
    def asks_for_all(self) -> bool:
        return not (self.min_s or self.key or self.strategy or self.engine or self.code)

    def admits(self, form: Chosen) -> bool:
        return (
            form.wall_s >= self.min_s
            and self.key in ("", form.key)
            and self.strategy in ("", form.strategy)
            and (not self.engine or self.engine in form.engines)
            and (not self.code or (bool(form.code) if self.code == "any" else form.code == self.code))
        )

    def sorted(self, forms: Iterable[RequestForm]) -> list[RequestForm]:
        """As many as were asked for. ``forms``: of one process, or what several have chosen so."""
        chosen = filter(self.admits, forms)
        if self.order == SLOWEST:
            return sorted(chosen, key=lambda form: -form.wall_s)[: self.limit]
        if self.order == FIRST_TOKEN:
            return sorted(chosen, key=lambda form: -(form.ttft_s or 0.0))[: self.limit]
        return sorted(chosen, key=lambda form: form.age_s)[: self.limit]

    def first(self, newest_first: Sequence[Kept], now: float) -> list[RequestForm]:
        """As :meth:`sorted`, of those that one process has kept: only forms that are taken are read, and for
        the newest no others are looked at."""
        admitted: Iterable[Kept] = newest_first if self.asks_for_all else filter(self.admits, newest_first)
        if self.order == NEWEST:
            taken: Iterable[Kept] = islice(admitted, self.limit)
        else:
            by = attrgetter("wall_s" if self.order == SLOWEST else "ttft_s")
            taken = heapq.nlargest(self.limit, admitted, key=by)
        return [kept.form(now) for kept in taken]


def query_of(values: Mapping[str, str]) -> Query:
    """From what stands behind a path. Raises :class:`InvalidRequest` that names the field."""
    unknown = sorted(set(values) - set(Query.__struct_fields__))
    if unknown:
        raise InvalidRequest(f"there is no {unknown[0][:64]!r} to choose by", field=unknown[0][:64])
    for name, value in values.items():
        if len(value) > MAX_VALUE_CHARS:
            raise InvalidRequest(f"{name} must have at most {MAX_VALUE_CHARS} characters", field=name)
    order, limit, min_s = values.get("order", NEWEST), values.get("limit", ""), values.get("min_s", "")
    if order not in ORDERS:
        raise InvalidRequest(f"order must be one of {', '.join(ORDERS)}", field="order")
    if limit and not (
        limit.isascii() and limit.isdigit() and len(limit) < 6 and 1 <= int(limit) <= MAX_LIMIT
    ):
        raise InvalidRequest(f"limit must be between 1 and {MAX_LIMIT}", field="limit")
    try:
        least_s = float(min_s or 0.0)
    except ValueError:
        least_s = -1.0
    if not 0.0 <= least_s < float("inf"):
        raise InvalidRequest("min_s must be a number of seconds that is not negative", field="min_s")
    return Query(
        order=order,
        limit=int(limit or DEFAULT_LIMIT),
        min_s=least_s,
        **{name: values.get(name, "") for name in ("key", "strategy", "engine", "code")},
    )
