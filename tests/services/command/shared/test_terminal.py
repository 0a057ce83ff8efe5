"""Whatever a client, a peer or a log holds: no command of ours hands it to the terminal as it is."""

from __future__ import annotations

import ast
import json
import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from microserve.services.command.main import main
from microserve.services.command.shared import terminal
from microserve.services.local.directory import ChildState, MeshDirectory, MeshState

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\x7f\x00\u200b"
FOLDER = Path(terminal.__file__).parents[1]


def is_harmless(output: str) -> bool:
    return all(each.isprintable() or each in "\n\t" for each in output)


def run(*words: str) -> str:
    result = CliRunner().invoke(main, words)
    assert is_harmless(result.output), result.output
    return result.output


@pytest.mark.parametrize("form", ["text", "json"])
def test_tail_shows_what_a_client_asked_for_and_what_a_service_printed(tmp_path: Path, form: str) -> None:
    events = [
        {
            "event": "http.rejected",
            "ts": 1.0,
            "service": "gateway",
            "id": "g",
            "path": f"/{HOSTILE}",
            HOSTILE: 1,
        },
        {"event": HOSTILE, "ts": 2.0, "service": HOSTILE, "id": HOSTILE, "level": HOSTILE},
        {
            "event": "request.finished",
            "ts": 3.0,
            "service": "gateway",
            "id": "g",
            "model": HOSTILE,
            "code": HOSTILE,
        },
        {"event": "http.rejected", "ts": 4.0, "service": "gateway", "path": "/\n00:00:00.000 gateway forged"},
    ]
    text = "\n".join([*(json.dumps(event, ensure_ascii=False) for event in events), HOSTILE, ""])
    (tmp_path / "gateway.jsonl").write_text(text)
    (tmp_path / "router.out").write_text(f"printed {HOSTILE}\n")
    shown = run("tail", "--dir", str(tmp_path), "--output", form)
    assert len(shown.splitlines()) == 6, "an event is one line"
    assert "owned" in shown


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_ps_shows_why_a_child_ended(tmp_path: Path, flags: list[str]) -> None:
    child = ChildState(HOSTILE, "failed", 0, HOSTILE, 1, f"ended: {HOSTILE}", "log")
    mesh = MeshDirectory(tmp_path)
    with mesh.hold():
        mesh.write(MeshState(os.getpid(), "http://here", HOSTILE, [child]))
        assert "ended: " in run("ps", "--directory", str(tmp_path), *flags)


def test_errors_are_as_harmless() -> None:
    assert "owned" in run("settings", "--set", f"gateway.{HOSTILE}=1")


def test_there_is_one_way_to_print() -> None:
    """``terminal.py`` escapes; nothing else in the commands prints."""
    found = []
    for path in FOLDER.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = ast.unparse(node.func)
            forbidden = name in (
                "print",
                "click.echo",
                "click.secho",
                "click.ClickException",
                "sys.stdout.write",
            )
            if forbidden and path.name not in ("terminal.py", "check_process.py"):
                found.append(f"{path.name}:{node.lineno}: {name}")
    assert found == [], "check_process.py speaks to its parent, which escapes"


JOURNALCTL = """
import json, sys
assert "--output=json" in sys.argv and "--unit=microserve-*" in sys.argv, sys.argv
if {fails}:
    sys.exit("No journal files were opened due to insufficient permissions.")
line = json.dumps({{"event": "engine.joined", "ts": 3.0, "service": "router", "id": "r0", "engine_id": "e0"}})
router, engine = ({{"_SYSTEMD_UNIT": f"microserve-{{name}}.service"}} for name in ("router", "engine@e0"))
entries = [
    {{"MESSAGE": line, **router, "__REALTIME_TIMESTAMP": "3000000"}},
    {{"MESSAGE": "Started", **engine, "__REALTIME_TIMESTAMP": "9000000"}},
    {{"MESSAGE": list(b"\\x1b[2Jraw"), **router}},
    {{"MESSAGE": None}},
]
print("\\n".join(map(json.dumps, entries)))
print("no JSON")
"""


@pytest.mark.parametrize("fails", [False, True])
def test_tail_reads_the_journal_when_asked_and_where_there_is_no_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    program = tmp_path / "journalctl"
    program.write_text(f"#!{sys.executable}\n{JOURNALCTL.format(fails=fails)}")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for flags in ([], ["--journal"]):
        shown = run("tail", *flags)
        if fails:
            assert "insufficient permissions" in shown
            continue
        first, second, third = shown.splitlines()
        assert "r0" in first and "engine.joined" in first and "engine_id=e0" in first
        assert "engine-e0" in second or "engine/e0" in second
        assert second.endswith("| Started")
        assert third.endswith("| \\x1b[2Jraw")
