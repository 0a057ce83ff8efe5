"""``microserve plan`` as it is typed: a table, JSON, and errors with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.services.command.main import main

ROOT = Path(__file__).parents[3]
PROFILE = str(ROOT / "examples/clusters/prfaas.json")
TRACE = str(ROOT / "tests/data/mooncake_conversation_2000.jsonl.gz")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["plan", *arguments])


def test_a_table_of_the_plan_and_of_what_it_is_compared_with() -> None:
    result = run(PROFILE)
    assert result.exit_code == 0, result.output
    table = {line[:19].strip(): line[19:].split("  ") for line in result.stdout.splitlines()[4:]}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in table.items()}
    assert cells[""] == ["plan", "no other cluster", "all prefill there"]
    assert cells["threshold, tokens"] == ["19,200", "-", "-"]
    assert cells["prefill here"] == ["3", "9", "-"]
    assert cells["decode here"] == ["5", "3", "8"]
    assert cells["requests/s"] == ["3.299", "2.108", "2.516"]
    assert cells["bound by"] == ["local prefill", "local prefill", "remote prefill"]
    assert "a formula: nothing waits in it" in result.stdout


def test_json_and_another_link() -> None:
    plans = json.loads(run(PROFILE, "--json", "--link-gbps", "5").stdout)
    assert plans["plan"]["threshold"] == pytest.approx(42_000, rel=0.01)
    assert plans["plan"]["bound"] == "link"
    assert plans["plan"]["link_share"] == pytest.approx(1.0)


def test_queues_are_simulated_where_that_is_asked_for() -> None:
    lines = run(PROFILE, "--simulate", "600").stdout.splitlines()
    assert [line[:13].strip() for line in lines[-6:]] == ["plan"] * 3 + ["by load alone"] * 3
    service = [float(line.split()[-3]) for line in lines[-6:]]
    with_queues = [float(line.split()[-4]) for line in lines[-6:]]
    assert all(longer > shorter for longer, shorter in zip(with_queues, service, strict=True))


def test_lengths_of_a_trace_and_of_a_histogram(tmp_path: Path) -> None:
    assert "prompts of 13,721 tokens on average" in run(PROFILE, "--trace", TRACE).stdout
    histogram = tmp_path / "lengths.json"
    histogram.write_text("[[1000, 0], [3000, 5]]")
    assert "prompts of 2,000 tokens on average" in run(PROFILE, "--histogram", str(histogram)).stdout


def test_as_many_engines_as_one_has() -> None:
    plans = json.loads(run(PROFILE, "--json", "--remote", "2", "--local", "4", "--alone", "8").stdout)
    assert plans["plan"]["num_remote"] == 2
    assert plans["plan"]["num_prefill"] + plans["plan"]["num_decode"] == 4
    alone = plans["no other cluster"]
    assert alone["num_prefill"] + alone["num_decode"] == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.json"], "cannot read nowhere.json"),
        ([PROFILE, "--trace", TRACE, "--histogram", TRACE], "one of the two"),
        ([PROFILE, "--histogram", "nowhere.json"], "cannot read nowhere.json"),
        ([PROFILE, "--histogram", PROFILE], "Expected `array`, got `object`"),
        ([PROFILE, "--trace", PROFILE], "prfaas.json, line 1"),
        ([PROFILE, "--link-gbps", "0"], "--link-gbps"),
        ([PROFILE, "--local", "1"], "--local"),
    ],
)
def test_what_is_wrong_is_named(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in result.output
