"""``microserve top`` without a terminal: a look as text and as JSON, and what is said where there is none."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.gateway.view.forms import AlarmForm
from microserve.services.command.main import main
from tests.support.command.scripted_server import served_aside
from tests.support.command.view_server import ViewServer
from tests.support.gateway.view_forms import health_form

GOLDEN = """\
http://HERE  1  rates of 60 s
req/s 0.0  tok/s 1  run 4  wait 1  KV 30%  hit 33%  check none yet  alarms 1

engine  state  run  wait  kv%  used  cached  free  grant  quar  lease  pre%  dec%  kv-in%  idle%  step ms  host       class  labels
e0      ready    3     1   60     6       2     2      0     0    0.0     0     0       0      0      0.0  127.0.0.1  -      -
e1      ready    1     0    0     0       5     5      0     0    0.0    50     0       0      0      0.0  127.0.0.1  -      -

  engine.lost        e9: silent

slowest of 3 requests
request  state       wall ms  ttft ms  tpot ms   in  cached  out  engines  strategy  why                   key  model
r3       runs          500.0    100.0    100.0    3       0    5  e0       auto      not recorded          -    tiny
r1       length        500.0    100.0     10.3  300     100   40  e0       auto      any: e0 of 2 by cost  -    tiny
r2       no_engines    100.0    100.0      0.0    3       0    5  e1       auto      not recorded          -    tiny
"""  # noqa: E501


def invoke(view: ViewServer, *words: str) -> tuple[Result, int]:
    with served_aside(view.answer) as server:
        return CliRunner().invoke(main, ["top", "--url", server.endpoint.url, *words]), server.port


@pytest.fixture
def view() -> ViewServer:
    return ViewServer(health=health_form(alarms=[AlarmForm("engine.lost", "e9", "silent")]))


@pytest.mark.parametrize("words", [[], ["--once"]])
def test_once_prints_plain_text(view: ViewServer, words: list[str]) -> None:
    result, port = invoke(view, *words)
    assert result.output.replace(f"127.0.0.1:{port}", "HERE") == GOLDEN
    assert result.exit_code == 0


def test_json_has_the_names_of_the_view(view: ViewServer) -> None:
    result, _ = invoke(view, "--json")
    read = json.loads(result.output)
    assert [*read] == ["at", "url", "index_alive", "summary", "engines", "running", "ended", "health"]
    assert read["summary"]["running"] == 4
    assert [each["id"] for each in read["running"] + read["ended"]] == ["r3", "r2", "r1"]
    assert read["engines"][0]["load"]["used_blocks"] == 6


@pytest.mark.parametrize(
    ("status", "said", "named"),
    [
        (401, "no key", ["asks for an API key: no key", "microserve key new NAME --operator"]),
        (403, "key 'a' is not an operator's", ["key 'a' is not", "microserve key list"]),
        (404, "Not Found", ["has no such view", "microserve doctor"]),
        (500, "broken", ["answers 500: broken"]),
    ],
)
def test_a_refusal_names_what_is_missing(status: int, said: str, named: list[str]) -> None:
    result, _ = invoke(ViewServer(status=status, refusal=said))
    assert result.exit_code == 1
    for part in named:
        assert part in result.stderr


def test_without_a_gateway_the_next_command_is_named(tmp_path: Path) -> None:
    words = ["top", "--directory", str(tmp_path), "--set", "gateway.port=1"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1
    assert re.search(r"no gateway: cannot connect to http://127.0.0.1:1: Connection refused\n.*microserve up",
                     result.stderr)  # fmt: skip


def test_an_interval_has_bounds() -> None:
    assert CliRunner().invoke(main, ["top", "--interval", "0"]).exit_code == 2
