"""The planner: real services under a timing model give the times that the model says, the same each time, and
strategies differ as they must."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

import msgspec
import pytest

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.router.strategies import BUILT_IN
from microserve.services.simulation.load import engine, planner
from microserve.services.simulation.load.engine import NUM_LAYERS
from microserve.services.simulation.load.figures.result import PointResult
from microserve.services.simulation.load.point import TOKEN_PARAMETERS, run_point
from microserve.services.simulation.load.task import Point, SimulateTask
from microserve.services.simulation.load.timing import PROFILES, Profile
from microserve.services.simulation.load.trace import TraceRequest

H200 = PROFILES["h200-8b"]
ROUND_TRIPS_S = 0.01
"""What messages between gateway, router and engines may add to a time; each takes up to 0.5 ms."""
PREFILL_DECODE = (("prefill",), ("decode",))
TRACE = Path(__file__).parents[3] / "tests/data/mooncake_conversation_2000.jsonl.gz"


def conversations(num_sessions: int = 6, num_turns: int = 5, turn_blocks: int = 3) -> list[TraceRequest]:
    """Each turn's prompt begins with the one before it; sessions share nothing."""
    fresh = count()
    requests = []
    for session in range(num_sessions):
        hash_ids: list[int] = []
        for turn in range(num_turns):
            hash_ids += [next(fresh) for _ in range(turn_blocks)]
            at_s = 8.0 * turn + session
            requests.append(TraceRequest(at_s, 512 * len(hash_ids), 64, tuple(hash_ids)))
    return sorted(requests, key=lambda request: request.at_s)


def apart(lengths: Sequence[int], num_output_tokens: int = 33) -> list[TraceRequest]:
    """Prompts that share nothing and meet nobody."""
    fresh = count()
    return [
        TraceRequest(
            10.0 * number, length, num_output_tokens, tuple(next(fresh) for _ in range(-(-length // 512)))
        )
        for number, length in enumerate(lengths)
    ]


def point(strategy: str, requests: list[TraceRequest], **changes: object) -> Point:
    base = Point(
        strategy=strategy,
        file="",
        load=len(requests) / (requests[-1].at_s - requests[0].at_s or 1.0),  # as fast as the trace itself
        requests=requests,
        profile=H200,
        num_engines=2,
        labels=(),
        scale=8,
        seed=0,
        parameters={},
        slo_ttft_s=5.0,
        slo_tpot_s=0.05,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def serve(strategy: str, requests: list[TraceRequest], **changes: object) -> PointResult:
    result = run_point(point(strategy, requests, **changes))
    assert result.num_failed == 0
    assert result.num_served + result.num_refused == result.num_requests == len(requests)
    return result


# --- times are the model's --------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1, 8])
def test_a_request_alone_takes_what_the_model_says(scale: int) -> None:
    num_tokens = 4096
    result = serve("data_parallel", apart([num_tokens]), scale=scale)
    steps = [H200.step_s([(512, start)], []) for start in range(0, num_tokens, 512)]
    assert sum(steps) < result.ttft_s.mean < sum(steps) + ROUND_TRIPS_S
    decode_s = H200.step_s([], [num_tokens + 16])
    assert result.tpot_s.mean == pytest.approx(decode_s, rel=0.01)
    assert result.jct_s.mean == pytest.approx(result.ttft_s.mean + 32 * result.tpot_s.mean, rel=0.01)
    assert result.hit_rate == 0.0 and result.sent_gb == 0.0


def _handoff_s(profile: Profile, num_tokens: int) -> tuple[float, PointResult]:
    """How much later the first token comes when its KV goes to another engine."""
    requests = apart([num_tokens] * 3)
    alone = serve("data_parallel", requests, profile=profile)
    apart_ = serve("disaggregated", requests, profile=profile, labels=PREFILL_DECODE)
    return apart_.ttft_s.mean - alone.ttft_s.mean, apart_


def test_at_low_load_a_handoff_costs_the_last_layers_put() -> None:
    """The layers before it are put while the next one is computed."""
    num_tokens = 8192
    late_s, result = _handoff_s(H200, num_tokens)
    last_s = H200.put_s(4096 / NUM_LAYERS)  # of a simulated step's tokens
    assert 0.0 < late_s < 2 * last_s + ROUND_TRIPS_S
    nbytes = 3 * num_tokens * H200.kv_nbytes_per_token
    assert result.sent_gb == pytest.approx(nbytes / 1e9, abs=1e-3)


def test_without_overlap_a_handoff_costs_the_whole_transfer() -> None:
    num_tokens = 8192
    slow = replace(H200, link_nbytes_per_s=3e9)
    hidden_s, _ = _handoff_s(slow, num_tokens)
    late_s, _ = _handoff_s(replace(slow, overlaps=False), num_tokens)
    assert late_s == pytest.approx(slow.put_s(num_tokens), rel=0.05)
    assert hidden_s < 0.7 * late_s


def test_a_link_slower_than_the_prefill_is_what_takes_the_time() -> None:
    num_tokens = 8192
    slow = replace(H200, link_nbytes_per_s=3e8)
    _, result = _handoff_s(slow, num_tokens)
    assert result.ttft_s.mean == pytest.approx(slow.put_s(num_tokens), rel=0.1)


# --- strategies differ as they must ------------------------------------------------------------------


def test_every_strategy_serves_a_trace() -> None:
    requests = conversations()
    for strategy in BUILT_IN:
        labels = (*PREFILL_DECODE, ())
        result = serve(strategy.name, requests, num_engines=3, labels=labels)
        assert result.num_served == len(requests), strategy.name
        assert result.ttft_s.p50 <= result.ttft_s.p90 <= result.ttft_s.p99
        assert 0.0 < result.tpot_s.mean < result.ttft_s.mean < result.jct_s.mean


@pytest.mark.parametrize("strategy", ["token_aware", "kv_cost", "cache_aware", "replicate_hot"])
def test_who_knows_of_prefixes_computes_less(strategy: str) -> None:
    requests = conversations()
    blind = serve("data_parallel", requests, num_engines=4)
    aware = serve(strategy, requests, num_engines=4)
    # Of a session's five turns, 10 of 15 parts are repeated; one of four engines has them by chance.
    assert blind.hit_rate < 0.3
    assert aware.hit_rate > 0.4


def test_past_saturation_the_first_token_comes_late_and_goodput_falls() -> None:
    requests = apart([8192] * 60)
    results = [serve("data_parallel", requests, load=load) for load in (1.0, 6.0, 30.0)]
    ttfts = [result.ttft_s.mean for result in results]
    assert ttfts[0] < ttfts[1] < ttfts[2]
    assert ttfts[2] > 3 * ttfts[0]
    assert results[0].slo_share == 1.0
    assert results[2].slo_share < 1.0
    assert results[2].goodput_per_s == pytest.approx(30.0 * results[2].slo_share, abs=1e-3)


def test_separate_engines_for_prefill_keep_decodes_even() -> None:
    requests = apart([8192] * 40, num_output_tokens=129)
    mixed = serve("data_parallel", requests, load=4.0)
    split = serve("disaggregated", requests, load=4.0, labels=PREFILL_DECODE)
    assert split.tpot_s.p99 < 0.7 * mixed.tpot_s.p99
    assert split.ttft_s.mean > mixed.ttft_s.mean


# --- the same again ----------------------------------------------------------------------------------


def _task(**changes: object) -> SimulateTask:
    fields = {
        "trace": str(TRACE),
        "strategies": ["balanced_adaptive", "replicate_hot"],
        "loads": [2.0],
        "num_requests": 30,
        "labels": ["prefill", "prefill", "decode", "decode"],
    }
    return msgspec.convert(fields | changes, SimulateTask)


def test_the_same_arguments_give_the_same_results(tmp_path: Path) -> None:
    """In other processes, with other hash seeds, by one or by two workers."""
    written = []
    for hash_seed, jobs in (("1", 1), ("2", 2)):
        out = tmp_path / f"{jobs}.jsonl"
        task = msgspec.json.encode(_task(out=str(out), jobs=jobs)).decode()
        done = subprocess.run(
            [sys.executable, "-m", planner.__name__, task],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            text=True,
        )
        assert done.stdout.count("\n") == 4
        written.append(out.read_bytes())
    assert written[0] == written[1]
    results = [msgspec.json.decode(line, type=PointResult) for line in written[0].splitlines()]
    assert [result.strategy for result in results] == ["balanced_adaptive", "replicate_hot"]
    assert all(result.num_served == 30 for result in results)
    (other,) = [run_point(each) for each in planner.points_of(_task(strategies=["replicate_hot"], seed=1))]
    assert other.digest != results[1].digest


def test_signs_of_life_are_no_part_of_what_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a mesh in which nobody dies may have fewer of them: line by line the same journal."""
    (only,) = planner.points_of(_task(strategies=["auto"]))
    few = run_point(only)
    monkeypatch.setattr(engine, "LIVENESS", Settings().bus.liveness)
    assert run_point(only) == few


# --- tasks -------------------------------------------------------------------------------------------


def test_all_built_in_strategies_are_the_default() -> None:
    points = planner.points_of(_task(strategies=[], loads=[1.0, 2.0]))
    assert [each.strategy for each in points[::2]] == [strategy.name for strategy in BUILT_IN]
    assert {each.load for each in points} == {1.0, 2.0}


def test_token_counts_of_built_in_strategies_are_scaled() -> None:
    built_in = {strategy.name: strategy for strategy in BUILT_IN}
    for name, parameters in TOKEN_PARAMETERS.items():
        (only,) = planner.points_of(_task(strategies=[name], scale=8))
        assert only.parameters == {name: {each: built_in[name].values[each] // 8 for each in parameters}}
    (only,) = planner.points_of(
        _task(strategies=["auto"], parameters={"auto": {"threshold": 800, "affinity": 0.5}})
    )
    assert only.parameters["auto"] == {"threshold": 100, "affinity": 0.5, "tau": 2048}


def test_a_strategy_of_ones_own(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from microserve.services.router.authoring import strategy\n\n\n"
        "@strategy\nasync def mine(mesh, request, *, label: str = 'decode'):\n"
        "    async for tokens in mesh.pick(label, request).start_generate(request):\n        yield tokens\n"
    )
    task = _task(strategies=[str(file)], parameters={"mine": {"label": "prefill"}})
    (only,) = planner.points_of(task)
    assert (only.strategy, only.file) == ("mine", str(file))
    assert run_point(only).num_served == 30
    file.write_text(file.read_text().replace("def mine", "def auto"))
    with pytest.raises(ConfigError, match="auto is the name of a built-in strategy"):
        planner.points_of(_task(strategies=[str(file)]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategies": ["nonsense"]}, "no strategy 'nonsense'.*balanced_adaptive"),
        ({"strategies": ["/nowhere/mine.py"]}, "mine.py: FileNotFoundError"),
        ({"loads": []}, "a load is requests a second"),
        ({"loads": [1.0, 0.0]}, "a load is requests a second"),
        ({"labels": ["prefill"]}, "1 labels for 4 engines"),
        ({"num_engines": 0, "labels": []}, "engines is 0, at least 1"),
        ({"jobs": 0}, "jobs is 0, at least 1"),
        ({"scale": 3}, "scale is 3, a power of two up to 128"),
        ({"profile": "abacus"}, "no profile 'abacus'"),
        ({"trace": "/nowhere/trace.jsonl"}, "cannot read /nowhere/trace.jsonl"),
        ({"parameters": {"auto": {"tau": 1}}}, "parameters of auto, which is not simulated"),
        ({"parameters": {"replicate_hot": {"depht": 1}}}, "has no such parameter"),
        ({"link_gbps": -1.0}, "link_gbps is -1"),
    ],
)
def test_a_task_that_cannot_be_done_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planner.points_of(_task(**changes))
