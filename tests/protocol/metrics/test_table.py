"""The tables of metrics: names that Prometheus takes, no name twice, and labels of which there is an end."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from microserve.protocol.metrics.family import Family, Kind
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table.common import COMMON
from microserve.protocol.metrics.table.engine import ENGINE
from microserve.protocol.metrics.table.gateway import GATEWAY
from microserve.protocol.metrics.table.index import INDEX
from microserve.protocol.metrics.table.router import ROUTER

ALL = (*COMMON, *ENGINE, *GATEWAY, *INDEX, *ROUTER)
NEVER = {"request", "request_id", "prompt", "client", "user", "tenant", "le", "quantile"}


def test_no_name_is_two_families() -> None:
    assert [name for name, count in Counter(family.name for family in ALL).items() if count > 1] == []
    for families in (ENGINE, GATEWAY):
        theirs = Counter(name for family in families for name in family.vllm)
        assert [name for name, count in theirs.items() if count > 1] == []


@pytest.mark.parametrize("family", ALL, ids=lambda family: str(family.name))
def test_a_family_says_what_it_is(family: Family) -> None:
    assert re.fullmatch(r"microserve_[a-z0-9_]+", family.name) and not family.name.endswith("_total")
    assert family.text.endswith(".") and "|" not in family.text
    assert not NEVER & {*family.labels}
    assert len({*family.labels}) == len(family.labels)
    assert bool(family.bounds) == (family.kind is Kind.HISTOGRAM)
    assert list(family.bounds) == sorted({*family.bounds})
    for suffix, unit in (("_seconds", "seconds"), ("_ratio", "ratio"), ("_bytes", "bytes")):
        assert not family.name.endswith(suffix) or family.unit == unit


def test_a_series_has_the_labels_of_its_family() -> None:
    with pytest.raises(ValueError, match="microserve_engine_kv_blocks has labels"):
        Readings().add(next(each for each in ENGINE if each.name.endswith("kv_blocks")), 1)
