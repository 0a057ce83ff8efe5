"""One request in lines: hops that add up, and why it went there."""

from __future__ import annotations

import re

import msgspec
import pytest

from microserve.gateway.view.forms import RequestDetail
from microserve.gateway.view.naming import named
from microserve.gateway.view.requests import timeline as timeline_of
from microserve.protocol.messages.strategy.decisions import Explained
from microserve.services.command.explain.table import lines
from microserve.services.command.top.story import engine_lines, health_lines, record_lines, request_lines
from tests.support.command.view_server import PHASES, RECORD, timeline
from tests.support.gateway.view_forms import engine_form, health_form, request_form
from tests.support.index.question_samples import EXPLANATION

FORM = request_form("r1", engines=["e0"], why="any: e0 of 2 by cost", phases_s=PHASES, wall_s=0.5)


def test_hops_add_up_to_the_wall_time() -> None:
    told = request_lines(RequestDetail(FORM, timeline(), [], []))
    hops = [line for line in told if re.match(r"  [a-z_]+ +[\d.]+ ms ", line)]
    assert sum(float(line.split()[1]) for line in hops) == pytest.approx(500.0)
    assert "  = wall           500.0 ms" in told


def test_the_reason_is_that_of_the_line_and_of_the_routers() -> None:
    text = "\n".join(request_lines(RequestDetail(FORM, timeline(), [RECORD], ["r9"])))
    for part in (
        "any: e0 of 2 by cost",
        "pick any by cost: e0",
        "note near hops=1",
        "generates on e0 from 100 of 300 tokens",
        "did not answer: r9",
    ):
        assert part in text


def test_a_record_with_all_that_a_router_keeps_is_told_as_explain_tells_it() -> None:
    costly = msgspec.structs.replace(EXPLANATION.attempts[0].picks[0], costs=[1.0, float("inf")])
    attempt = msgspec.structs.replace(EXPLANATION.attempts[0], picks=[costly])
    found = msgspec.structs.replace(EXPLANATION, attempts=[attempt])
    record = msgspec.json.decode(msgspec.json.encode(named(found)))
    told = [line for line in lines(Explained(0, "its router", [found], 0, 0), {}) if line]
    assert record_lines([record]) == told


def test_a_record_of_another_version_is_shown_as_it_is() -> None:
    told = request_lines(RequestDetail(None, [], [{"request_id": "r1", "odd": 1}], []))
    assert any('"odd":1' in line for line in told)


def test_one_that_runs_has_no_timeline_yet() -> None:
    told = request_lines(RequestDetail(request_form("r3", at=0.0, age_s=4.0), [], [], []))
    assert any("it still runs, for 4.0 s now" in line for line in told)


def test_a_request_of_no_time_has_a_timeline() -> None:
    form = request_form("r0", phases_s={"queued": 0.0}, wall_s=0.0)
    assert "  = wall             0.0 ms" in request_lines(RequestDetail(form, timeline_of(form), [], []))


def test_no_line_commands_the_terminal() -> None:
    bad = "\x1b[2J"
    record = {**RECORD, "request_id": bad, "strategy": bad}
    told = request_lines(
        RequestDetail(request_form(bad, http_id=bad, model=bad, why=bad), timeline(), [record], [bad])
    )
    told += [*engine_lines(engine_form(bad)), *health_lines(health_form(version=bad))]
    assert all(line.isprintable() for line in told)
