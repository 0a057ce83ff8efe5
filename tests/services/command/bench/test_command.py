"""``microserve bench`` from its flags to its report, in this process and in several."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.services.command.main import main
from tests.services.command.shared.test_terminal import HOSTILE, is_harmless
from tests.support.command.scripted_server import Answer, Asked, say_all, served_aside

EASY = ("--max-lag-ms", "1e9", "--max-slip-ms", "1e9")
"""What the machine of the tests has to do besides is no matter here."""


def bench(*words: str) -> Result:
    return CliRunner().invoke(main, ["bench", *words])


async def two_tokens(asked: Asked) -> None:
    await say_all(asked, "a", "b")


def run_against(answer: Answer, *words: str) -> Result:
    with served_aside(answer) as server:
        return bench("--url", server.endpoint.url, "--output-len", "2", *words)


def test_the_report(tmp_path: Path) -> None:
    file, picture = tmp_path / "out.json", tmp_path / "out.png"
    done = run_against(
        two_tokens,
        *("-n", "9", *EASY, "--concurrency", "3", "--json", str(file), "--plot", str(picture)),
        *("--percentiles", "50,99.9", "--goodput", "ttft:1e6", "tpot:1e6"),
    )
    assert done.exit_code == 0, done.output
    assert "warmed up: 4 requests in " in done.stderr
    assert "it has no /tokenize" in done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].strip("=") == " Serving Benchmark Result "
    assert lines[1].split() == ["Successful", "requests:", "9"]
    assert any(line.startswith("P99.9 E2EL (ms):") for line in lines)
    body = json.loads(file.read_text())
    assert body["valid"] and body["completed"] == 9 and body["total_output_tokens"] == 18
    assert body["request_goodput"] == body["request_throughput"]
    assert len(body["requests"]) == 9 and body["generator"]["num_processes"] == 1
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_several_processes_make_one_report(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    done = run_against(two_tokens, "-n", "9", *EASY, "--processes", "2", "--json", str(file))
    assert done.exit_code == 0, done.output
    body = json.loads(file.read_text())
    assert [row["number"] for row in body["requests"]] == list(range(9))
    assert body["generator"]["num_processes"] == 2


def test_it_refuses_to_report_what_it_could_not_measure() -> None:
    words = ("-n", "3", "--max-lag-ms", "1e9", "--max-slip-ms", "0")
    refused = run_against(two_tokens, *words)
    assert refused.exit_code == 1 and refused.stdout == ""
    assert "the load generator itself was the bottleneck" in refused.stderr
    assert "ms later than planned (p99; at most 0 ms, --max-slip-ms)" in refused.stderr
    forced = run_against(two_tokens, *words, "--force")
    assert forced.exit_code == 1
    assert forced.stdout.startswith("NOT VALID: ") and "Successful requests:" in forced.stdout


def test_failures_are_told_and_nothing_of_theirs_reaches_the_terminal() -> None:
    number = 0

    async def answer(asked: Asked) -> None:
        nonlocal number
        number += 1
        if number % 2:
            await asked.reply(503, {"error": {"message": f"away {HOSTILE}"}})
        else:
            await two_tokens(asked)

    done = run_against(answer, "-n", "8", *EASY, "--warmup", "0", "--concurrency", "1")
    assert done.exit_code == 0
    assert "failed: 4 x http 503: away \\x1b]0;owned" in done.output
    assert is_harmless(done.output)


def test_a_server_that_serves_nothing_is_one_sentence() -> None:
    async def refuse(asked: Asked) -> None:
        await asked.reply(404, {"error": {"message": "no such model"}})

    done = run_against(refuse)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.endswith("Error: warming up failed: http 404: no such model\n")
    assert "has no model 'other', but scripted" in run_against(two_tokens, "--model", "other").stderr
    done = bench("--url", "http://127.0.0.1:9")
    assert done.exit_code == 1 and done.stderr.startswith("Error: cannot connect to http://127.0.0.1:9: ")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--goodput", "ttfb:3"], "not NAME:MS"),
        (["--goodput", "ttft"], "not NAME:MS"),
        (["ttft:3"], "unexpected extra argument"),
        (["--percentiles", "a"], "not numbers"),
        (["--percentiles", "101"], "not numbers"),
        (["--duration", "3"], "--rate, --concurrency or --trace"),
        (["--arrival", "bursts"], "needs --rate"),
        (["--lengths", "uniform", "--spread", "2"], "at most 1"),
        (["--trace", "a", "--file", "b"], "one of them"),
        (["--file", "absent.jsonl"], "cannot read absent.jsonl"),
        (["--trace", "absent.csv"], "cannot read absent.csv"),
        (["--url", "ftp://h"], "is not http://"),
        (["--set", "gateway.prot=1"], "gateway.prot"),
    ],
)
def test_wrong_flags(words: list[str], told: str) -> None:
    done = bench(*words)
    assert done.exit_code == 2, done.output
    assert told in done.stderr


def test_fewer_places_than_processes() -> None:
    done = run_against(two_tokens, "-n", "4", "--concurrency", "1", "--processes", "2")
    assert done.exit_code == 2 and "--concurrency is less than --processes" in done.stderr
