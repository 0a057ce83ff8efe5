"""The command line: quick help, exact errors, settings that read back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import msgspec
import pytest
from click.testing import CliRunner, Result

from microserve.protocol.settings.gateway import GatewaySettings
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings
from microserve.protocol.settings.vllm import VllmSettings
from microserve.services.command.main import main
from microserve.services.command.settings_text import MASK, as_toml
from microserve.services.command.shared.flags import Flags
from microserve.services.local.composition import assignment

HEAVY = (
    "torch",
    "transformers",
    "numpy",
    "zmq",
    "rich",
    "textual",
    "structlog",
    "asyncio",
    "microserve.protocol",
)


def invoke(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_help_imports_nothing_heavy() -> None:
    """Speed, without measuring time: 150 ms of start-up is what these imports would cost."""
    program = (
        "import sys\n"
        "from microserve.services.command.main import main\n"
        "for words in (['--help'], ['up', '--help'], ['engine', '--help'], ['top', '--help']):\n"
        "    main(words, standalone_mode=False)\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_every_command_has_help() -> None:
    context = click.Context(main)
    for name in main.list_commands(context):
        result = invoke(name, "--help")
        assert result.exit_code == 0, name
        assert len(result.output.splitlines()) > 3


@pytest.mark.parametrize("command", ["engine", "index", "router", "up", "settings"])
def test_a_wrong_setting_exits_2_and_names_its_path(command: str) -> None:
    result = invoke(command, "--set", "index.adress=tcp://127.0.0.1:1")
    assert result.exit_code == 2
    assert result.stderr.startswith("Error: index.adress: ")
    assert len(result.stderr.splitlines()) == 1


def test_an_engine_s_device_is_a_flag_and_decides_its_heap() -> None:
    result = CliRunner().invoke(main, ["engine", "--device", "abacus"])
    assert result.exit_code == 2
    assert "engine.device" in result.output
    result = CliRunner().invoke(main, ["engine", "--device", "cuda:0", "--set", "kvcache.heap=shm"])
    assert result.exit_code == 2
    assert "kvcache.heap" in result.output


def test_a_missing_file_exits_2() -> None:
    result = invoke("index", "--config", "absent.toml")
    assert (result.exit_code, result.stderr) == (
        2,
        "Error: cannot read absent.toml: No such file or directory\n",
    )


def test_oneshot_needs_the_demo() -> None:
    assert invoke("up", "--oneshot", "--no-demo").exit_code == 2
    assert invoke("up", "--oneshot", "--detach").exit_code == 2


def test_friendly_flags_win_and_reach_other_processes_whole() -> None:
    flags = Flags(None, ("gateway.port=1", "model.path=/a"))
    flags.set("gateway.port", 2)
    flags.set("model.path", '/models/with = and "quotes" and ümlaut')
    flags.set("mesh.engines", None)
    words = flags.as_arguments()
    assert words[::2] == ["--set"] * 4
    settings = load_settings(overrides=words[1::2])
    assert settings.gateway.port == 2
    assert settings.model.path == '/models/with = and "quotes" and ümlaut'


@pytest.mark.parametrize("value", ["", "8000", "true", "tcp://127.0.0.1:0", "[1]", 'a\\b\n"c"'])
def test_assignments_keep_text_as_text(value: str) -> None:
    assert load_settings(overrides=[assignment("model.path", value)[1]]).model.path == value


def test_settings_print_as_toml_that_reads_back() -> None:
    result = invoke(
        "settings", "--set", "router.strategies.balanced.ratio=0.2", "--set", 'engine.labels=["a"]'
    )
    assert result.exit_code == 0
    read = msgspec.convert(tomllib.loads(result.output), Settings)
    assert read.router.strategies == {"balanced": {"ratio": 0.2}}
    assert read.engine.labels == ["a"]


def test_secrets_are_masked() -> None:
    text = as_toml(
        Settings(gateway=GatewaySettings(api_keys=["sk-secret"]), vllm=VllmSettings(api_key="sk-secret"))
    )
    assert "sk-secret" not in text
    assert f'api_keys = ["{MASK}"]' in text
    assert f'api_key = "{MASK}"' in text
    assert 'api_key = ""' in as_toml(Settings())


def test_keys_are_made_once(tmp_path: Path) -> None:
    first = invoke("keys", str(tmp_path / "keys"))
    assert first.exit_code == 0
    assert first.output.startswith("public key ")
    second = invoke("keys", str(tmp_path / "keys"))
    assert second.exit_code == 2
    assert "exists; remove it first" in second.stderr


def test_tail_reads_the_directory_it_is_given(tmp_path: Path) -> None:
    event = {"ts": 1.0, "event": "service.ready", "service": "index", "id": "i", "address": "tcp://x"}
    (tmp_path / "index.jsonl").write_text(json.dumps(event) + "\n")
    assert invoke("tail", "--dir", str(tmp_path)).output.endswith("service.ready address=tcp://x\n")
    assert json.loads(invoke("tail", "--dir", str(tmp_path), "-o", "json").output) == event
    assert invoke("tail", "--dir", str(tmp_path / "absent")).exit_code == 2


def test_ps_and_down_without_a_mesh(tmp_path: Path) -> None:
    assert invoke("ps", "--directory", str(tmp_path)).exit_code == 1
    assert invoke("ps", "--json", "--directory", str(tmp_path)).output == "null\n"
    result = invoke("down", "--directory", str(tmp_path))
    assert (result.exit_code, result.output) == (0, "no mesh runs here\n")


def test_version() -> None:
    assert invoke("version").output.startswith("microserve 0.")
    assert invoke("--version").output == invoke("version").output


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_told_how_to_complete(shell: str) -> None:
    result = invoke("completion", shell)
    assert result.exit_code == 0
    assert f"_MICROSERVE_COMPLETE={shell}_complete" in result.output


def test_tab_completes_commands_and_flags() -> None:
    def completed(words: str, at: int) -> list[str]:
        asked = {"_MICROSERVE_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(at)}
        program = [sys.executable, "-P", "-c", "from microserve.services.command.main import main; "
                   "main(prog_name='microserve')"]  # fmt: skip
        done = subprocess.run(program, env=os.environ | asked, capture_output=True, text=True, check=True)
        return [each.partition(",")[2] for each in done.stdout.split()]

    assert completed("microserve to", 1) == ["top"]
    assert "--filter" in completed("microserve tail --f", 2)


def test_a_wrong_filter_of_tail_names_the_fields(tmp_path: Path) -> None:
    result = invoke("tail", "--dir", str(tmp_path), "--filter", "kye=x")
    assert result.exit_code == 2
    assert "fields: key, strategy, engine, code, status, path, model" in result.stderr


@pytest.mark.parametrize(
    ("typed", "meant"), [("gatewey", "gateway"), ("stragety", "strategy"), ("dwon", "down")]
)
def test_a_misspelt_command_is_told_which_was_meant(typed: str, meant: str) -> None:
    result = invoke(typed)
    assert result.exit_code == 2
    assert f"No such command '{typed}'. Did you mean '{meant}'?" in result.stderr
    assert "Did you mean" not in invoke("zzzzzz").stderr


def test_a_setting_by_a_wrong_variable_stops_every_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MICROSERVE_GATEWAY_PORT", "1")
    for command in ("engine", "gateway", "up", "settings", "strategy list"):
        result = invoke(*command.split())
        assert result.exit_code == 2
        assert "did you mean MICROSERVE_GATEWAY__PORT?" in result.stderr


def test_the_settings_file_may_be_named_by_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.toml").write_text("[gateway]\nport = 1111\n")
    (tmp_path / "b.toml").write_text("[gateway]\nport = 2222\n")
    monkeypatch.setenv("MICROSERVE_CONFIG", str(tmp_path / "a.toml"))
    assert "port = 1111" in invoke("settings").output
    assert "port = 2222" in invoke("settings", "--config", str(tmp_path / "b.toml")).output
    monkeypatch.setenv("MICROSERVE_CONFIG", "")
    assert "port = 8000" in invoke("settings").output


def test_a_terminal_without_our_characters_is_no_error(tmp_path: Path) -> None:
    event = {"ts": 1.0, "event": "request.finished", "service": "gateway", "id": "g", "engines": ["a", "b"]}
    (tmp_path / "gateway.jsonl").write_text(json.dumps(event) + "\n")
    command = [sys.executable, "-P", "-m", "microserve.services", "tail", "--dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "a\\u2192b" in told.stdout
