"""``microserve key`` and ``microserve usage``: a key is shown once, its hash kept, and use told by name."""

from __future__ import annotations

import json
import multiprocessing
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.gateway.keys.key import PREFIX, ApiKey, digest_of, parse_keys
from microserve.gateway.keys.ledger import add_counts
from microserve.gateway.keys.usage import Counts
from microserve.services.command.key import append
from microserve.services.command.main import main


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_a_new_key_is_printed_once_and_its_hash_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    limits = ["--requests-per-minute", "60", "--tokens-per-minute", "9000", "--concurrent-streams", "4"]
    limits += ["--daily-token-budget", "100000", "--model", "tiny", "--strategy", "auto", "--priority", "-3"]
    result = invoke("key", "new", "alice", "--file", path, *limits)
    assert result.exit_code == 0, result.output
    made = result.output.strip()
    assert made.startswith(PREFIX) and made not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert parse_keys(path.read_text(), "") == [
        ApiKey(
            name="alice",
            sha256=(digest_of(made),),
            requests_per_minute=60,
            tokens_per_minute=9000,
            concurrent_streams=4,
            daily_token_budget=100_000,
            models=("tiny",),
            strategies=("auto",),
            priority=-3,
        )
    ]
    path.chmod(0o640)
    assert invoke("key", "new", "ops", "--operator", "--set", f"gateway.api_keys_file={path}").exit_code == 0
    assert stat.S_IMODE(path.stat().st_mode) == 0o640, "whoever may read it may still"
    listed = invoke("key", "list", "--file", path)
    assert [line.split()[0] for line in listed.output.splitlines()] == ["alice", "ops"]
    assert "requests_per_minute=60" in listed.output and digest_of(made) not in listed.output
    as_json = json.loads(invoke("key", "list", "--json", "--file", path).output)
    assert [(each["name"], each["operator"], each["keys"]) for each in as_json] == [
        ("alice", False, 1),
        ("ops", True, 1),
    ]


def test_what_an_operator_wrote_stays(tmp_path: Path) -> None:
    path, link = tmp_path / "keys.toml", tmp_path / "link"
    path.write_text('# ours\n[keys.a]\nsha256 = "' + "0" * 64 + '" # of May\n')
    link.symlink_to(path)
    assert invoke("key", "new", "b", "--file", link).exit_code == 0
    assert link.is_symlink() and path.read_text().startswith("# ours\n[keys.a]\n")
    assert "# of May" in path.read_text()
    before = path.read_text()
    for name in ("a", "b"):
        result = invoke("key", "new", name, "--file", path)
        assert result.exit_code == 1 and "already" in result.output
    for name in ("", "a b", "-x", "api_keys.0", "ü", "x" * 65):
        assert invoke("key", "new", "--file", path, "--", name).exit_code == 2
    assert path.read_text() == before
    path.write_text("[keys")
    assert invoke("key", "new", "c", "--file", path).exit_code == 1
    assert path.read_text() == "[keys"
    assert invoke("key", "new", "c").exit_code == 2, "no file is named"
    assert invoke("key", "list", "--file", tmp_path / "absent").exit_code == 1
    assert invoke("key", "new", "c", "--file", tmp_path / "absent" / "keys").exit_code == 1


def _append(path: Path, name: str) -> None:
    append(path, ApiKey(name=name, sha256=(digest_of(name),)))


def test_two_who_make_keys_at_one_time_lose_none(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    context = multiprocessing.get_context("spawn")
    with context.Pool(2) as pool:
        pool.starmap(_append, [(path, f"key-{number}") for number in range(20)])
    assert {key.name for key in parse_keys(path.read_text(), "")} == {f"key-{n}" for n in range(20)}


@pytest.fixture
def used(tmp_path: Path) -> Path:
    path = tmp_path / "usage.db"
    add_counts(
        path,
        {
            ("2026-11-28", "alice"): Counts(3, 1, 300, 100, 30),
            ("2026-11-29", "alice"): Counts(2, 0, 200, 0, 20),
            ("2026-11-29", "bob"): Counts(1, 5, 10, 0, 1),
            ("2026-11-29", "\x1b[2J"): Counts(1),
        },
        "",
    )
    return path


def test_usage_by_day_and_key(used: Path) -> None:
    text = invoke("usage", "--directory", used.parent).output
    assert [line.split() for line in text.splitlines()][1:4] == [
        ["2026-11-28", "alice", "3", "1", "300", "100", "30"],
        ["2026-11-29", "\\x1b[2J", "1", "0", "0", "0", "0"],
        ["2026-11-29", "alice", "2", "0", "200", "0", "20"],
    ]
    assert "\x1b" not in text
    lines = invoke("usage", "--file", used, "--key", "alice", "--since", "2026-11-29", "-o", "json").output
    assert [json.loads(line) for line in lines.splitlines()] == [
        {
            "day": "2026-11-29",
            "key": "alice",
            "requests": 2,
            "refused": 0,
            "prompt_tokens": 200,
            "cached_tokens": 0,
            "output_tokens": 20,
        }
    ]
    assert invoke("usage", "--file", used, "--until", "2026-11-27").output.count("\n") == 1


def test_usage_of_nothing_says_so(tmp_path: Path) -> None:
    result = invoke("usage", "--directory", tmp_path)
    assert result.exit_code == 1 and "usage.db" in result.output
    assert list(tmp_path.iterdir()) == []
