"""Reading event files while they are written, rotated and truncated; and how lines look."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.protocol.messages.router import PHASES
from microserve.services.command.shared.terminal import echo_cells
from microserve.services.command.tail.columns import request_cells
from microserve.services.command.tail.command import Filter, fields_of, format_event, show
from microserve.services.local.event_log import EventLog, LogFile, last_error, parse_event


def line(ts: float, event: str, service: str = "router", **fields: Any) -> bytes:
    return msgspec.json.encode({"ts": ts, "event": event, "service": service, "id": "r0", **fields}) + b"\n"


def canonical(ts: float, request_id: str, **fields: Any) -> bytes:
    phases = {f"{name}_s": 0.001 * (place + 1) for place, name in enumerate(PHASES)}
    values = {
        "request_id": request_id,
        "http_request_id": request_id.rpartition("-")[0] or request_id,
        "model": "SmolLM2",
        "strategy": "balanced",
        "engines": ["e1", "e0"],
        "prompt_tokens": 512,
        "cached_tokens": 256,
        "received_tokens": 200,
        "output_tokens": 48,
        "finish_reason": "stop",
        "status": 200,
        "ttft_s": 0.036,
        "wall_s": 0.045,
        **phases,
        **fields,
    }
    return line(ts, "request.finished", "gateway", **values)


def shown(directory: Path, chosen: Filter, *, as_json: bool = False) -> list[str]:
    lines: list[str] = []
    show(directory, chosen, follow=False, as_json=as_json, echo=lines.append)
    return lines


def names(log: EventLog | LogFile) -> list[str]:
    return [event["event"] for event in log.read()]


def test_files_are_merged_by_time(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(line(1, "one") + line(4, "four"))
    (tmp_path / "b.jsonl").write_bytes(line(2, "two") + line(3, "three"))
    log = EventLog(tmp_path)
    assert names(log) == ["one", "two", "three", "four"]
    (tmp_path / "c.jsonl").write_bytes(line(5, "five"))
    assert names(log) == ["five"]
    log.close()


@given(cuts=st.lists(st.integers(0, 400), max_size=8))
def test_half_written_lines_are_read_once_and_whole(
    cuts: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("log") / "a.jsonl"
    written = b"".join(line(number, f"e{number}", text="ü" * number) for number in range(5))
    borders = sorted({0, len(written), *(cut for cut in cuts if cut < len(written))})
    log, seen = LogFile(path), []
    for begin, end in pairwise(borders):
        with open(path, "ab") as file:
            file.write(written[begin:end])
        seen += names(log)
    log.close()
    assert seen == ["e0", "e1", "e2", "e3", "e4"]


def test_rotation_loses_no_line_of_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(1, "one"))
    log = LogFile(path)
    assert names(log) == ["one"]
    with open(path, "ab") as file:
        file.write(line(2, "two"))
    os.rename(path, tmp_path / "a.jsonl.1")
    assert names(log) == ["two"]
    path.write_bytes(line(3, "three"))
    assert names(log) == ["three"]
    log.close()


def test_truncation_starts_over(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(1, "one") + line(2, "two") + b'{"half')
    log = LogFile(path)
    assert names(log) == ["one", "two"]
    path.write_bytes(line(3, "three"))
    assert names(log) == ["three"]
    log.close()


def test_text_that_is_no_event_keeps_its_place(tmp_path: Path) -> None:
    (tmp_path / "engine-e0.jsonl").write_bytes(line(1, "one", "engine") + b"Segmentation fault\n[1, 2]\n")
    (tmp_path / "index.jsonl").write_bytes(line(2, "two", "index"))
    text = [each.split(maxsplit=1)[1] for each in shown(tmp_path, Filter())]
    assert text[1:3] == ["engine/e0      | Segmentation fault", "engine/e0      | [1, 2]"]
    assert text[3].startswith("index/r0")
    assert parse_event(b"  \n") is None


def test_a_request_is_one_line_whose_phases_are_shown(tmp_path: Path) -> None:
    (tmp_path / "gateway.jsonl").write_bytes(canonical(1.5, "r7"))
    (tmp_path / "router.jsonl").write_bytes(line(1.4, "request.finished", request_id="r7"))
    (text,) = shown(tmp_path, Filter())
    assert text.split(" ", 1)[1] == (
        "r7 | SmolLM2 | balanced e1→e0 | in=512 cached=256 received=200 out=48 | "
        "queued 1.0 tokenised 2.0 routed 3.0 granted 4.0 prefilled 5.0 transferred 6.0 admitted 7.0 "
        "first_token 8.0 decoded 9.0 = 45.0 ms | ttft 36.0 ms | stop"
    )


def test_a_published_version_and_a_canary_are_named() -> None:
    for fields, told in (
        ({"strategy_version": 0, "share": "stable"}, "| balanced e1→e0 |"),
        ({"strategy_version": 7, "share": "stable"}, "| balanced 7 e1→e0 |"),
        ({"strategy_version": 8, "share": "canary"}, "| balanced 8 (canary) e1→e0 |"),
    ):
        event = parse_event(canonical(1, "c", **fields))
        assert event is not None
        assert told in format_event(event)


def test_a_refused_request_says_why() -> None:
    event = parse_event(
        canonical(1, "c", engines=[], ttft_s=None, finish_reason="", status=503, code="no_engines")
    )
    assert event is not None
    assert format_event(event).endswith("| no token | no_engines HTTP 503")


def test_request_filter_shows_all_services_and_parts(tmp_path: Path) -> None:
    events = [
        line(1, "request.accepted", request_id="c-1"),
        line(2, "kv.sent", "engine", request_id="c-1-0", nbytes=12),
        line(3, "request.accepted", request_id="c-12"),
        line(4, "request.accepted", request_id="c-1-x"),
        canonical(5, "c-1-1"),
    ]
    (tmp_path / "all.jsonl").write_bytes(b"".join(events))
    found = shown(tmp_path, Filter(request_id="c-1"))
    assert len(found) == 3
    assert found[1].endswith("kv.sent request_id=c-1-0 nbytes=12")
    assert [
        msgspec.json.decode(each)["ts"] for each in shown(tmp_path, Filter(request_id="c-1"), as_json=True)
    ] == [
        1,
        2,
        5,
    ]


@pytest.mark.parametrize(
    "wanted", ["job-7", "job-7.0a1b2c3d", "chatcmpl-job-7.0a1b2c3d", "cmpl-job-7.0a1b2c3d"]
)
def test_a_client_s_id_shows_what_every_service_said(wanted: str, tmp_path: Path) -> None:
    events = [
        line(1, "request.finished", "router", request_id="job-7.0a1b2c3d-0"),
        line(2, "request.finished", "engine", request_id="job-7.0a1b2c3d-0"),
        line(3, "kv.sent", "engine", request_id="job-7.0a1b2c3d-1~2"),
        canonical(4, "job-7.0a1b2c3d-0", http_request_id="job-7"),
        line(5, "http.rejected", "gateway", http_request_id="job-7" if wanted == "job-7" else "x"),
        line(6, "request.finished", "router", request_id="job-77.0a1b2c3d-0"),
        line(7, "request.finished", "router", request_id="job.0a1b2c3d-7"),
        canonical(8, "job-7.1.0a1b2c3d-0", http_request_id="job-7.1"),
    ]
    (tmp_path / "all.jsonl").write_bytes(b"".join(events))
    found = [
        msgspec.json.decode(each)["ts"] for each in shown(tmp_path, Filter(request_id=wanted), as_json=True)
    ]
    assert found == [1, 2, 3, 4, 5][: 5 if wanted == "job-7" else 4]


def test_default_view_leaves_out_single_requests_but_never_trouble(tmp_path: Path) -> None:
    events = [
        line(1, "service.ready", address="tcp://x"),
        line(2, "request.accepted", request_id="c"),
        line(3, "kv.send_failed", level="warning", request_id="c"),
        line(4, "grant.opened"),
    ]
    (tmp_path / "router.jsonl").write_bytes(b"".join(events))
    assert [each.split()[2] for each in shown(tmp_path, Filter())] == ["service.ready", "kv.send_failed"]
    assert len(shown(tmp_path, Filter(service="router"))) == 4
    assert shown(tmp_path, Filter(service="engine")) == []


def test_slow_shows_only_slow_requests(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(
        canonical(1, "quick") + canonical(2, "slow", wall_s=2.5) + line(3, "other")
    )
    (text,) = shown(tmp_path, Filter(slow_s=2.0))
    assert " slow " in text


def test_follow_shows_what_comes(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(line(1, "service.started"))
    steps: list[Callable[[], object]] = [
        lambda: path.write_bytes(path.read_bytes() + line(2, "service.ready")[:9]),
        lambda: path.write_bytes(path.read_bytes() + line(2, "service.ready")[9:]),
        lambda: (tmp_path / "b.jsonl").write_bytes(line(3, "service.stopped")),
    ]

    def wait(_seconds: float) -> None:
        if not steps:
            raise KeyboardInterrupt
        steps.pop(0)()

    lines: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        show(tmp_path, Filter(), follow=True, as_json=False, echo=lines.append, wait=wait)
    assert [each.split()[2] for each in lines] == ["service.started", "service.ready", "service.stopped"]


def test_last_error_prefers_the_event_and_looks_only_at_this_life(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    old = line(1, "service.failed", level="error", error="the old one")
    path.write_bytes(old)
    assert last_error(path, len(old)) == ""
    path.write_bytes(old + b"Traceback:\nKeyError: 'x'\n")
    assert last_error(path, len(old)) == "KeyError: 'x'"
    failed = line(2, "service.failed", level="error", error="no such model")
    path.write_bytes(old + b"x" * 100_000 + b"\n" + failed + b"a warning\n")
    assert last_error(path, len(old)) == "no such model"
    assert last_error(tmp_path / "absent", 0) == ""


def columns(directory: Path, chosen: Filter, *, width: int = 0) -> list[str]:
    found: list[str] = []
    show(
        directory,
        chosen,
        follow=False,
        as_json=False,
        echo=found.append,
        echo_cells=lambda cells: found.append("".join(text for text, _ in cells)),
        width=width,
    )
    return found


def test_on_a_terminal_there_are_columns_under_their_names(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(
        canonical(1, "r7", why="decode: e1 of 4 by cost", alone="no_heap", moves=1) + line(2, "service.ready")
    )
    head, request, other = columns(tmp_path, Filter())
    assert re.split(r"  +", head)[1:4] == ["request", "in", "cached"]
    assert head.index("wall ms") + len("wall ms") == request.index("45.0") + len("45.0")
    assert request.endswith("balanced        decode: e1 of 4 by cost; alone: no_heap; moved 1x")
    assert other.split()[2] == "service.ready"
    assert len(columns(tmp_path, Filter(), width=170)[1]) == 170


@pytest.mark.parametrize("has_colours", [True, False])
def test_colours_are_for_terminals_that_want_them(
    has_colours: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    if not has_colours:
        monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    (tmp_path / "g.jsonl").write_bytes(canonical(1, "r7\x1b[2J", status=500))
    show(tmp_path, Filter(), follow=False, as_json=False, echo=print, echo_cells=echo_cells)
    told = capsys.readouterr().out
    assert ("\x1b[" in told) is has_colours
    assert "r7\\x1b[2J" in told and "\x1b[2J" not in told


def test_what_failed_is_told_by_a_word_and_a_colour() -> None:
    event = parse_event(canonical(1, "c", status=503, code="no_engines", finish_reason="", ttft_s=None))
    assert event is not None
    assert [cell for cell in request_cells(event) if cell[1] == "bad"] == [("no_engines    ", "bad")]


def test_filters_of_several_fields_must_all_hold(tmp_path: Path) -> None:
    (tmp_path / "g.jsonl").write_bytes(
        canonical(1, "a", key="x", engines=["e0"])
        + canonical(2, "b", key="x", engines=["e1", "e2"], status=503)
        + canonical(3, "c", key="y", engines=["e2"], status=429)
        + line(4, "service.ready")
    )

    def found(*texts: str) -> list[int]:
        chosen = Filter(fields=fields_of(texts))
        return [msgspec.json.decode(each)["ts"] for each in shown(tmp_path, chosen, as_json=True)]

    assert found("key=x") == [1, 2]
    assert found("key=x", "engine=e2") == [2]
    assert found("key=x", "key=y", "engine=e2") == [2, 3]
    assert found("status=4xx") == [3]
    assert found("status=503") == [2]
    assert found("key=") == []
    for wrong in ("key", "kye=x"):
        with pytest.raises(ValueError, match="fields: key, strategy, engine"):
            fields_of([wrong])
