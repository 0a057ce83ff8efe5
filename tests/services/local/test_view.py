"""What a user sees: each change once, and nothing that a model's text could do to a terminal."""

from __future__ import annotations

import io
import json

import msgspec
import pytest

from microserve.services.local.demo.request import Answer
from microserve.services.local.directory import ChildState, MeshState
from microserve.services.local.view import JsonView, PlainView, RichView, View, describe, make_view, summarise

ANSWER = Answer("Paris.", num_tokens=11, first_token_s=0.25, total_s=0.75)


def mesh(*states: str, ready: bool = False) -> MeshState:
    children = [
        ChildState(
            f"engine-e{number}", state, 100 + number, "tcp://here", int(state == "restarting"), "", "e.jsonl"
        )
        for number, state in enumerate(states)
    ]
    return MeshState(1, "http://127.0.0.1:8000", "tiny", children, ready)


def session(view: View) -> None:
    view.progress("Loading weights", 0.5)
    view.mesh(mesh("starting", "starting"))
    view.mesh(mesh("ready", "starting"))
    view.mesh(mesh("ready", "ready", ready=True))
    view.asked("Where?")
    view.piece("Pa\x1b[2J")
    view.piece("ris.")
    view.answered(ANSWER)
    view.note("logs: here")
    view.mesh(mesh("restarting", "ready", ready=True))
    view.close()


@pytest.mark.parametrize("kind", [PlainView, RichView])
def test_people_see_every_change_and_no_control_characters(kind: type[PlainView] | type[RichView]) -> None:
    out = io.StringIO()
    session(kind(out))
    text = out.getvalue()
    for part in (
        "engine-e0    ready",
        "engine-e1    ready",
        "> Where?",
        "ris.",
        "logs: here",
        "restarted 1x",
    ):
        assert part in text
    assert "11 tokens; the first after 250 ms, then 20 tokens/s" in text
    assert "\x1b[2J" not in text
    assert "Pa\ufffd[2J" in text


def test_an_engine_that_is_up_says_what_it_runs_on() -> None:
    about = "avx512, 2 threads, exact in cpu1-bfloat16-1"
    up = ChildState("engine-e0", "ready", 7, "tcp://here", 0, "", "e.jsonl", about)
    assert describe(up).endswith(f"tcp://here {about}")
    assert about not in describe(msgspec.structs.replace(up, state="restarting"))


def test_plain_lines_say_each_change_once() -> None:
    out = io.StringIO()
    session(PlainView(out))
    assert out.getvalue().count("engine-e1") == 2


def test_a_long_step_says_how_far_it_is_and_not_too_often() -> None:
    out = io.StringIO()
    view = PlainView(out)
    for percent in range(101):
        view.progress("Fetching model.safetensors (1.50 GB)", percent / 100)
    lines = out.getvalue().splitlines()
    assert lines[0] == "Fetching model.safetensors (1.50 GB)"
    assert [line.split()[:2] for line in lines[1:]] == [["25", "%"], ["50", "%"], ["75", "%"]]


def test_json_lines_hold_everything() -> None:
    out = io.StringIO()
    session(JsonView(out))
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [event["event"] for event in events] == [
        *("progress", "mesh", "mesh", "mesh", "asked", "piece", "piece", "answered", "note", "mesh")
    ]
    assert events[3]["children"][1]["state"] == "ready"
    assert events[7]["num_tokens"] == 11


def test_off_a_terminal_there_is_no_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    assert isinstance(vars(make_view(as_json=False))["_view"], PlainView)
    assert isinstance(vars(make_view(as_json=True))["_view"], JsonView)


def test_one_token_has_no_rate() -> None:
    assert summarise(Answer("a", 1, 0.1, 0.1)) == "1 token; the first after 100 ms"


@pytest.mark.parametrize("as_json", [False, True])
def test_a_reader_that_has_left_ends_nothing(as_json: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Left(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("sys.stdout", Left())
    monkeypatch.setattr("sys.stderr", Left())
    session(make_view(as_json=as_json))
