"""``microserve simulate`` as it is typed: a table, files, and errors with their exit codes."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner

from microserve.services.command.main import main
from microserve.services.simulation.load.figures.result import PointResult

TRACE = str(Path(__file__).parents[3] / "tests/data/mooncake_conversation_2000.jsonl.gz")


def run(*arguments: str) -> int:
    return CliRunner().invoke(main, ["simulate", *arguments]).exit_code


def test_a_table_results_and_plots(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out, plots = tmp_path / "results.jsonl", tmp_path / "img"
    code = run(
        *("--trace", TRACE, "--requests", "20", "--load", "1,4", "--engines", "2"),
        *("--strategy", "balanced", "--strategy", "data_parallel", "--labels", "prefill,decode"),
        *("--set", "balanced.ratio=0.3", "--profile", "a100-8b", "--longest", "20000"),
        *("--out", str(out), "--plot", str(plots)),
    )
    told = capfd.readouterr().out.splitlines()
    assert code == 0
    assert "20 requests, 2 engines a100-8b (a model from data sheets, not a measurement)" in told[0]
    assert [line.split()[:2] for line in told[2:6]] == [
        ["balanced", "1"],
        ["balanced", "4"],
        ["data_parallel", "1"],
        ["data_parallel", "4"],
    ]
    assert told[6:] == [str(plots / name) for name in ("ttft.svg", "tpot.svg", "jct.svg")]
    assert all(Path(path).is_file() for path in told[6:])
    results = [msgspec.json.decode(line, type=PointResult) for line in out.read_bytes().splitlines()]
    assert [(result.strategy, result.load, result.num_served) for result in results] == [
        ("balanced", 1.0, 20),
        ("balanced", 4.0, 20),
        ("data_parallel", 1.0, 20),
        ("data_parallel", 4.0, 20),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--load", "x"], ""),
        (["--set", "ratio=0.3"], ""),
        (["--set", "balanced.ratio"], ""),
        (["--strategy", "balanced", "--set", "balanced.ratio=2"], "router.strategies.balanced.ratio"),
        (["--strategy", "nonsense"], "no strategy 'nonsense'"),
        (["--profile", "abacus"], "no profile 'abacus'"),
        (["--strategy", "balanced", "--requests", "1", "--out", "/nowhere/r"], "cannot write /nowhere/r"),
    ],
)
def test_a_wrong_flag_ends_with_code_2(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run("--trace", TRACE, *arguments) == 2
    assert message in capfd.readouterr().err


MINE = """
import time
from microserve.services.router.authoring import strategy
{at_load}
@strategy
async def mine(mesh, request):
    {body}
    async for tokens in mesh.pick(None, request).start_generate(request):
        yield tokens
"""


@pytest.mark.parametrize(
    ("at_load", "body", "says"),
    [
        (
            "",
            "while True: pass",
            "mine: StrategyHung: the strategy held the router for 0.5 s without waiting",
        ),
        ("", "time.sleep(600)", "mine: StrategyHung: the strategy held the router for 0.5 s"),
        ("", "raise ValueError('boo')", "mine: ValueError: boo"),
        ("while True: pass", "pass", "held the router for 0.5 s without waiting"),
    ],
)
def test_a_strategy_that_hangs_or_fails_is_told_in_words(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], at_load: str, body: str, says: str
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE.format(at_load=at_load, body=body))
    code = run("--trace", TRACE, "--requests", "20", "--load", "1", "--strategy", str(mine))
    told = capfd.readouterr().err.splitlines()
    assert code == (2 if at_load else 1)
    assert told[-1].startswith("Error: ")
    assert says in told[-1]


def test_one_that_only_takes_long_is_told_beside_its_result(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "mine.py"
    mine.write_text(MINE.format(at_load="", body="time.sleep(0.15)"))
    assert run("--trace", TRACE, "--requests", "10", "--load", "1", "--strategy", str(mine)) == 0
    told = capfd.readouterr()
    assert told.out.splitlines()[-1].startswith("mine")
    assert (
        "Note: mine held the router for longer than 0.1 s at a time, in 10 of 10 requests: "
        "routers would take it back"
    ) in told.err


def test_a_bad_line_of_the_trace_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text('{"timestamp": 0, "input_length": 5, "output_length": "x", "hash_ids": [1]}\n')
    assert run("--trace", str(trace)) == 2
    told = capfd.readouterr().err
    assert f"{trace}, line 1: Expected `int`, got `str` - at `$.output_length`" in told
