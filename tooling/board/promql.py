"""PromQL over our own families: whoever names a family or a label that is in no table gets an error.

Functions are of a :class:`Reader`, which knows over which window rates are and by which variables of a board
each selector is narrowed. Expressions are plain strings, to be put together by ``+ - * /``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from microserve.protocol.metrics.family import Family, Kind
from microserve.protocol.metrics.table.common import COMMON
from microserve.protocol.metrics.table.engine import ENGINE
from microserve.protocol.metrics.table.gateway import GATEWAY
from microserve.protocol.metrics.table.index import INDEX
from microserve.protocol.metrics.table.router import ROUTER

TARGET = ("job", "instance", "service", "id")
"""Labels that Prometheus gives each series, by scrape.yml and ``targets.json``."""
OF_SERVICE = {
    **{family.name: ("model_name", "engine") for family in ENGINE},
    **{family.name: ("router",) for family in ROUTER},
    **{family.name: () for family in (*GATEWAY, *INDEX, *COMMON)},
}
"""Labels that all families of a service have beside their own, by name of each family that there is."""


@dataclass(frozen=True)
class Reader:
    window: str
    """Of rates."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Matchers, by the label that a family must have for them."""

    def series(self, family: Family, suffix: str = "", **where: str) -> str:
        """``where``: what a label must be, or match if it begins with ``~``, or not match, with ``!~``."""
        labels = labels_of(family)
        _check(family, where, (*labels, *TARGET))
        matchers = [self.variables[label] for label in ("job", *labels) if label in self.variables]
        matchers += [_matcher(label, value) for label, value in where.items()]
        name = f"{family.name}{'_total' if family.kind is Kind.COUNTER else suffix}"
        return f"{name}{{{', '.join(matchers)}}}" if matchers else name

    def total(self, family: Family, *by: str, **where: str) -> str:
        return f"sum{_by(family, by)}({self.series(family, **where)})"

    def most(self, family: Family, *by: str, **where: str) -> str:
        return f"max{_by(family, by)}({self.series(family, **where)})"

    def least(self, family: Family, *by: str, **where: str) -> str:
        return f"min{_by(family, by)}({self.series(family, **where)})"

    def rate(self, family: Family, *by: str, of: str = "", **where: str) -> str:
        """A second. ``of``: ``_count`` or ``_sum`` of a histogram."""
        if (family.kind is Kind.HISTOGRAM) != bool(of) or family.kind is Kind.GAUGE:
            raise ValueError(f"no rate of {family.name}{of}, a {family.kind}")
        return f"sum{_by(family, by)}(rate({self.series(family, of, **where)}[{self.window}]))"

    def quantile(self, part: float, family: Family, *by: str, **where: str) -> str:
        if family.kind is not Kind.HISTOGRAM:
            raise ValueError(f"no quantile of {family.name}, a {family.kind}")
        _check(family, by, (*labels_of(family), *TARGET))
        selector = self.series(family, "_bucket", **where)
        return f"histogram_quantile({part:g}, sum{_list((*by, 'le'))}(rate({selector}[{self.window}])))"

    def mean(self, family: Family, *by: str, **where: str) -> str:
        return over(self.rate(family, *by, of="_sum", **where), self.rate(family, *by, of="_count", **where))

    def outside(self, name: str) -> str:
        """A metric that is not ours: Prometheus' own ``up``, prometheus-client's ``process_*``."""
        if name != "up" and not name.startswith("process_"):
            raise ValueError(f"{name} is in no table")
        matcher = self.variables.get("job", "")
        return f"{name}{{{matcher}}}" if matcher else name


def over(part: str, whole: str) -> str:
    return f"{part}\n/ {whole}"


def share(part: str, whole: str) -> str:
    """The same, of sums by the same labels; 0 where nothing of that part has ever happened, so that it has no
    series."""
    return f"({part} or 0 * {whole})\n/ {whole}"


def labels_of(family: Family) -> tuple[str, ...]:
    return (*OF_SERVICE[family.name], *family.labels)


def _check(family: Family, asked: Mapping[str, str] | tuple[str, ...], known: tuple[str, ...]) -> None:
    if unknown := [label for label in asked if label not in known]:
        raise ValueError(f"{family.name} has no {', '.join(unknown)}")


def _by(family: Family, by: tuple[str, ...]) -> str:
    _check(family, by, (*labels_of(family), *TARGET))
    return _list(by)


def _list(by: tuple[str, ...]) -> str:
    return f" by ({', '.join(by)}) " if by else ""


def _matcher(label: str, value: str) -> str:
    for sign in ("!~", "~", "!"):
        if value.startswith(sign):
            operator = {"!~": "!~", "~": "=~", "!": "!="}[sign]
            return f'{label}{operator}"{value.removeprefix(sign)}"'
    return f'{label}="{value}"'
