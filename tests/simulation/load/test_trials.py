"""What an author asks of a simulated run: where the time went, who did what, who asked, what if an engine
dies; and that a strategy which never ends is ended."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import msgspec
import pytest

from microserve.protocol.errors import ConfigError, StrategyError
from microserve.services.simulation.load import planner, progress
from microserve.services.simulation.load.figures.result import PointResult, Row
from microserve.services.simulation.load.planner import points_of
from microserve.services.simulation.load.point import judged_point
from microserve.services.simulation.load.task import SimulateTask

NUM_REQUESTS, NUM_SESSIONS = 48, 6


@pytest.fixture
def trace(tmp_path: Path) -> str:
    """Sessions of which each turn's prompt begins with the turn before it; one request in eight is long."""
    rng, path, turns = random.Random(1), tmp_path / "trace.jsonl", dict.fromkeys(range(NUM_SESSIONS), 0)
    with path.open("w") as file:
        for number in range(NUM_REQUESTS):
            session = rng.randrange(NUM_SESSIONS)
            turns[session] += 1
            blocks = 1 + turns[session] if number % 8 else 24
            line = {
                "timestamp": number * 200,
                "input_length": 512 * blocks - 100,
                "output_length": rng.randrange(20, 120),
                "hash_ids": [1000 * session + block for block in range(blocks)],
                "session": session,
                "attributes": {"user": f"u{session % 2}"},
            }
            file.write(json.dumps(line) + "\n")
    return str(path)


def served(trace: str, strategy: str = "data_parallel", **fields: object) -> tuple[PointResult, list[Row]]:
    base = {
        "trace": trace,
        "strategies": [strategy],
        "loads": [4.0],
        "num_engines": 3,
        "rows": "-",
        "scale": 8,
    }
    [point] = points_of(msgspec.convert(base | fields, SimulateTask))
    judged = judged_point(point)
    return judged.result, judged.rows


def test_time_by_prompt_length_work_by_engine_and_a_row_a_request(trace: str) -> None:
    result, rows = served(trace, "disaggregated", labels=["prefill", "decode", "decode"])
    assert result.num_served == len(rows) == NUM_REQUESTS
    lengths = {(each.from_tokens, each.below_tokens): each for each in result.by_length}
    assert sum(each.num_requests for each in lengths.values()) == NUM_REQUESTS
    in_bucket = [row for row in rows if 8192 <= row.prompt_tokens < 16384]
    long, short = lengths[8192, 16384], lengths[512, 1024]
    assert (long.num_requests, long.num_served) == (len(in_bucket), len(in_bucket))
    ttfts = [row.ttft_s for row in in_bucket if row.ttft_s is not None]
    assert long.ttft_s.mean == pytest.approx(sum(ttfts) / len(ttfts), abs=1e-5)
    assert long.ttft_s.p50 > 2 * short.ttft_s.p50
    # Who prefills computes the prompts and samples the first tokens; the others decode.
    prefill, *decoding = result.engines
    assert prefill.num_requests == NUM_REQUESTS == prefill.output_tokens
    assert prefill.prompt_tokens > 100 * sum(each.prompt_tokens for each in decoding)
    assert (
        sum(each.output_tokens for each in decoding) == sum(row.output_tokens for row in rows) - NUM_REQUESTS
    )
    assert all(0.0 < each.busy_share < 1.0 for each in result.engines)
    assert all(0.0 < each.kv_share < each.kv_peak_share < 1.0 for each in result.engines)
    assert rows[0].why.startswith("decode: ") and rows[0].engines[1] == "engine-0"
    assert max(row.at_s + row.jct_s for row in rows) == pytest.approx(result.span_s, abs=0.01)


def test_strategies_see_the_sessions_of_a_trace(trace: str) -> None:
    sticky, rows = served(trace, "sticky", parameters={"sticky": {"by": "session", "factor": 50.0}})
    homes: dict[str, set[str]] = {}
    for row in rows:
        homes.setdefault(row.attributes["session"], set()).update(row.engines)
    assert len(homes) == NUM_SESSIONS and all(len(engines) == 1 for engines in homes.values())
    spread, _ = served(trace)
    assert sticky.hit_rate > spread.hit_rate


@pytest.mark.parametrize("suffix", ["csv", "jsonl"])
def test_files_and_tables_of_several_seeds(
    suffix: str, trace: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = tmp_path / "out.jsonl", tmp_path / f"rows.{suffix}"
    task = SimulateTask(
        trace=trace,
        strategies=["auto", "sticky"],
        loads=[4.0],
        num_engines=2,
        seed=3,
        seeds=3,
        detail=True,
        out=str(out),
        rows=str(rows),
    )
    assert planner.main([msgspec.json.encode(task).decode()]) == 0
    results = [msgspec.json.decode(line, type=PointResult) for line in out.read_bytes().splitlines()]
    assert [(each.strategy, each.seed) for each in results] == [
        (name, seed) for name in ("auto", "sticky") for seed in (3, 4, 5)
    ]
    with rows.open() as file:
        read = list(csv.DictReader(file)) if suffix == "csv" else [json.loads(line) for line in file]
    assert len(read) == 6 * NUM_REQUESTS
    assert {str(row["seed"]) for row in read} == {"3", "4", "5"}
    told = capsys.readouterr().out.splitlines()
    [line] = [line for line in told if line.startswith("auto")]
    means = sorted(each.ttft_s.mean for each in results[:3])
    assert means[0] < means[2], "seeds differ"
    assert line.split()[2] == f"{means[1]:.2f}"
    around = told[told.index(line) + 1]
    assert f"3 seeds, least to most: TTFT mean {means[0]:.2f} to {means[2]:.2f} s" in around
    assert len([line for line in told if line.split()[:1] == ["engine-1"]]) == 2
    assert len([line for line in told if "8,192 to 16,384" in line]) == 2


def test_an_engine_that_dies_costs_time_and_no_request(trace: str) -> None:
    calm, _ = served(trace)
    dead, rows = served(trace, kill=["1@3-6"])
    assert dead.num_failed == 0 and dead.num_served == NUM_REQUESTS
    assert dead.jct_s.mean > calm.jct_s.mean
    moved = [row for row in rows if len(row.engines) > 1]
    assert moved and all("engine-1" in row.engines[:-1] for row in moved)
    assert {row.output_tokens for row in rows} == {row.output_tokens for row in served(trace)[1]}


def test_a_slow_engine_has_more_to_do_for_less(trace: str) -> None:
    calm, _ = served(trace)
    slow, _ = served(trace, slow=["engine-1@0:6"])
    assert (slow.num_served, slow.num_failed) == (NUM_REQUESTS, 0)
    assert slow.jct_s.mean > 1.2 * calm.jct_s.mean
    before, after = calm.engines[1], slow.engines[1]
    assert after.busy_share > before.busy_share
    assert after.num_requests < before.num_requests, "its queue is seen"
    assert after.prompt_tokens + after.output_tokens < before.prompt_tokens + before.output_tokens


def test_messages_that_are_lost_or_late_cost_time_and_no_request(trace: str) -> None:
    calm, _ = served(trace)
    bad, _ = served(trace, lost=0.002, late=0.05)
    assert (bad.num_served, bad.num_failed) == (NUM_REQUESTS, 0)
    assert bad.jct_s.mean > calm.jct_s.mean
    again, _ = served(trace, lost=0.002, late=0.05)
    assert again.digest == bad.digest


@pytest.mark.parametrize(
    ("field", "wrong", "said"),
    [
        ("kill", ["engine-3@1"], "there are engines 0 to 2"),
        ("kill", ["1"], "is not ENGINE@SECOND"),
        ("kill", ["1@5:3"], "is not ENGINE@SECOND"),
        ("kill", ["1@5-4"], "over before it begins"),
        ("slow", ["1@5"], ":FACTOR"),
        ("slow", ["1@5:0.5"], "a factor is 1 or more"),
        ("lost", 1.0, "a share"),
        ("late", -0.1, "a share"),
        ("seeds", 0, "at least 1"),
        ("max_wall_s", 0.0, "above 0"),
    ],
)
def test_what_is_no_trouble_is_said(field: str, wrong: object, said: str, trace: str) -> None:
    with pytest.raises(ConfigError, match=said):
        served(trace, "data_parallel", **{field: wrong})


SPINS = "        await asyncio.sleep(0)"
SLEEPS = "        await asyncio.sleep(1e-8)"
ASKS = """        grant = await engine.prep_recv(request, end=16)
        await engine.release(request, grant)"""


@pytest.mark.parametrize("body", [SPINS, SLEEPS, ASKS], ids=["spins", "sleeps", "asks"])
def test_a_strategy_that_never_ends_is_ended_in_one_sentence(
    body: str, trace: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "MAX_IDLE_EVENTS", 100_000)
    file = tmp_path / "endless.py"
    file.write_text(
        "import asyncio\nfrom microserve.services.router.authoring import strategy\n\n\n"
        "@strategy\nasync def endless(mesh, request):\n    engine = mesh.pick(None, request)\n"
        f"    while True:\n{body}\n    yield engine.start_generate(request)\n"
    )
    with pytest.raises(StrategyError, match=r"^endless goes round and round: [^\n]+$"):
        served(trace, str(file))


def test_a_run_that_takes_too_long_is_ended(trace: str) -> None:
    with pytest.raises(StrategyError, match=r"^data_parallel: ended after \d+ s \(--max-wall\): \d+ of 48 "):
        served(trace, max_wall_s=1e-6)
