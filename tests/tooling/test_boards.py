"""Boards and alerts are as their tables say, and Grafana's own types take boards without losing a word."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from tests.test_packaging import ROOT

TOOLING = ROOT / "tooling"
BOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "deploy/grafana").glob("*.json")}
each_board = pytest.mark.parametrize("board", BOARDS.values(), ids=BOARDS.keys())


def test_all_files_are_as_the_tables_say() -> None:
    command = [sys.executable, str(TOOLING / "boards.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def lost(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """What of ``ours`` is not in ``theirs``, which may have defaults beside it."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return [each for key in ours for each in lost(ours[key], theirs.get(key, ...), f"{path}.{key}")]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        both = enumerate(zip(ours, theirs, strict=True))
        return [each for at, (our, their) in both for each in lost(our, their, f"{path}[{at}]")]
    return [] if ours == theirs else [f"{path}: {ours!r} became {theirs!r}"]


@each_board
def test_grafanas_types_know_every_field(board: dict[str, Any]) -> None:
    register_default_plugins()
    theirs = json.loads(JSONEncoder(sort_keys=True).encode(Dashboard.from_json(board)))
    begins = re.compile(
        r".*\.thresholds\.steps\[0\]\.value: None became Ellipsis"
    )  # at no value: they leave it out
    assert [each for each in lost(board, theirs) if not begins.fullmatch(each)] == []


@each_board
def test_panels_say_what_they_are_and_lie_beside_each_other(board: dict[str, Any]) -> None:
    panels = board["panels"]
    assert [number for number, count in Counter(panel["id"] for panel in panels).items() if count > 1] == []
    taken: Counter[tuple[int, int]] = Counter()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        taken.update(
            (place["x"] + across, place["y"] + down)
            for across in range(place["w"])
            for down in range(place["h"])
        )
        if panel["type"] != "row":
            assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
            assert len(panel["description"]) > 30, panel["title"]
            references = [target["refId"] for target in panel["targets"]]
            assert references and len(set(references)) == len(references), panel["title"]
    assert max(taken.values()) == 1


@each_board
def test_every_variable_that_is_asked_for_is_there(board: dict[str, Any]) -> None:
    names = {variable["name"] for variable in board["templating"]["list"]}
    assert {"DS_PROMETHEUS", "job"} <= names
    text = json.dumps([board["panels"], board["annotations"]])
    used = set(re.findall(r"\$\{?([A-Za-z_]+)", text)) - {"__rate_interval"}
    assert used <= names


WRONG = """
import sys
sys.path.insert(0, sys.argv[1])
from board.promql import Reader
from microserve.protocol.metrics.table import engine, router
ask = Reader("5m")
for wrong in (
    lambda: ask.total(engine.RUNNING, "heap"),
    lambda: ask.total(engine.RUNNING, state="open"),
    lambda: ask.rate(engine.RUNNING),
    lambda: ask.rate(engine.TTFT),
    lambda: ask.quantile(0.5, router.FAILOVERS),
    lambda: ask.outside("vllm:num_requests_running"),
):
    try:
        print(wrong())
    except ValueError as error:
        print("error:", error)
print(ask.rate(router.FAILOVERS, "job", "code", code="!engine_lost"))
"""


def test_what_is_in_no_table_is_an_error() -> None:
    command = [sys.executable, "-c", WRONG, str(TOOLING)]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert told == [
        "error: microserve_engine_requests_running has no heap",
        "error: microserve_engine_requests_running has no state",
        "error: no rate of microserve_engine_requests_running, a gauge",
        "error: no rate of microserve_engine_time_to_first_token_seconds, a histogram",
        "error: no quantile of microserve_router_failovers, a counter",
        "error: vllm:num_requests_running is in no table",
        'sum by (job, code) (rate(microserve_router_failovers_total{code!="engine_lost"}[5m]))',
    ]
