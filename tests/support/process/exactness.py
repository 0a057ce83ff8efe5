"""Exactness of a real mesh: what ``make exactness`` runs, on real processes (index, router, engines).

    python tests/support/process/exactness.py --model DIR [--dtype bfloat16] [--requests 200]

Sends the same mixed requests under every strategy: prompts of 1 to 2,000 tokens with shared prefixes, 16 in
flight, greedy and seeded sampling. Engines of an exact numerics class are held to bits (bitwise.py): tokens
and log-probabilities of every request are those of the request alone on one engine, also when an engine is
killed or drained under load; beside plain requests a quarter as many with grammars, with calls of tools,
with n = 3 and with log-probabilities of their prompts (cases.py). In fp32 greedy tokens of plain ones must be
those of ``transformers`` ``generate`` too; engines that promise no bits, as on a GPU (``--device cuda:0``),
are held to that alone, and sampled answers to those of the first strategy. Prints a line a strategy; exits 1
on any mismatch, 2 where nothing is promised.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from microserve.protocol.bus.transport import ZmqBus
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus.gateway_peer import BusClient
from tests.support.process.bitwise import HARMS, ask_alone, check_bits, crowd
from tests.support.process.cases import Case, all_kinds, make_cases
from tests.support.process.processes import MeshProcesses

STRATEGIES = [strategy.name for strategy in BUILT_IN]
SETTINGS = [
    # So that each strategy does all that it can do, also with short prompts.
    "router.strategies.balanced_adaptive.min_share=8",
    "router.strategies.elastic_roles={period_s=0.2,ttft_s=0.1,drain_s=1.0}",
    "router.strategies.hedged.after_s=0.05",
    "router.strategies.kv_cost.temperature=0.5",
    "router.strategies.min_ttft.balance=1.0",
    "router.strategies.priority.places=4",
    "router.strategies.replicate_hot={depth=2,hot=1,period_s=0.2}",
    "router.strategies.tenant_share={share=0.5,places=8}",
    "router.strategies.thirds.least=32",
]
PATIENT = ["bus.stuck_s=60", "bus.liveness=40", "router.call_timeout_s=300", "engine.drain_s=2"]
"""Sixteen long prompts on two slow engines wait their turn, and only who is killed is lost. An engine that
leaves has no time for all of them to end: they move."""
HARMED_UNDER = ["data_parallel", "disaggregated", "balanced", "migrate", "auto"]
"""Strategies under which engines are killed and drained: one each of how they share out a request."""


def oracle(
    model_path: Path, cases: list[Case], cache: Path | None = None, device: str = "cpu"
) -> list[list[int] | None]:
    """Greedy answers of ``transformers`` in fp32, one request at a time; None for sampled cases."""
    import torch
    from transformers import AutoModelForCausalLM

    known: dict[str, list[int]] = {}
    if cache is not None and cache.is_file():
        known = json.loads(cache.read_text())
    torch.set_num_threads(2)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32).eval().to(device)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    answers: list[list[int] | None] = []
    for case in cases:
        if not case.greedy:
            answers.append(None)
            continue
        key = json.dumps([case.prompt, case.params.max_tokens])
        if key not in known:
            ids = torch.tensor([case.prompt], device=device)
            with torch.inference_mode():
                out = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=case.params.max_tokens,
                    min_new_tokens=case.params.max_tokens,
                    do_sample=False,
                )
            known[key] = out[0, len(case.prompt) :].tolist()
        answers.append(known[key])
    if cache is not None:
        cache.write_text(json.dumps(known))
    return answers


async def run_strategy(client: BusClient, strategy: str, cases: list[Case]) -> list[list[int]]:
    """Tokens of all cases under one strategy, in order of the list."""
    answers = await crowd(client, strategy, cases)
    for answer in answers:
        if answer.reason != "length":
            raise AssertionError(f"{strategy}: a request ended with {answer.ended}")
    return [answer.token_ids for answer in answers]


def mismatches(cases: list[Case], expected: list[list[int] | None], got: list[list[int]]) -> list[str]:
    """One line for each case whose tokens differ."""
    lines = []
    for number, (case, want, have) in enumerate(zip(cases, expected, got, strict=True)):
        if want is not None and want != have:
            first = next((i for i, (a, b) in enumerate(zip(want, have, strict=False)) if a != b), -1)
            kind = "greedy" if case.greedy else "sampled"
            lines.append(
                f"case {number} ({kind}, {len(case.prompt)} prompt tokens): differs at output {first}"
            )
    return lines


async def check(
    router_address: str,
    cases: list[Case],
    expected: list[list[int] | None],
    strategies: list[str],
    num_engines: int,
) -> int:
    """Run every strategy; the number of mismatches, each printed."""
    bus = ZmqBus()
    reference = list(expected)
    wrong = 0
    try:
        async with BusClient(bus, router_address) as client:
            await client.wait_engines(num_engines)
            for strategy in strategies:
                started = time.monotonic()
                got = await run_strategy(client, strategy, cases)
                if strategy == strategies[0]:
                    # Sampled answers of the first strategy are what all others must give.
                    reference = [e if e is not None else g for e, g in zip(expected, got, strict=True)]
                bad = mismatches(cases, reference, got)
                wrong += len(bad)
                tokens = sum(map(len, got))
                print(
                    f"{strategy:14} {len(cases)} requests, {tokens} tokens, {len(bad)} mismatches, "
                    f"{time.monotonic() - started:.0f} s",
                    flush=True,
                )
                for line in bad:
                    print(f"  {line}", flush=True)
    finally:
        bus.close()
    return wrong


def device_settings(device: str) -> list[str]:
    if device == "cpu":
        return []
    # A checksum waits for the whole device: puts would never be late.
    return [f"engine.device={device}", "kvcache.heap=cuda_ipc", "kvcache.checksums=false"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--max-prompt", type=int, default=2000)
    parser.add_argument("--engines", type=int, default=2)
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--device", default="cpu", help="of the engines and of the oracle: cpu or cuda:N")
    parser.add_argument("--set", action="append", default=[], help="a setting of the mesh")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument(
        "--harmed",
        default=",".join(HARMED_UNDER),
        help="strategies with an engine killed and one drained; '' for none",
    )
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    cases = make_cases(arguments.requests, vocab_size=config["vocab_size"], max_prompt=arguments.max_prompt)
    strategies = arguments.strategies.split(",")
    harmed = [strategy for strategy in arguments.harmed.split(",") if strategy]
    wrong = 0
    expected: list[list[int] | None] = []
    if arguments.dtype == "float32":
        started = time.monotonic()
        expected = oracle(arguments.model, cases, arguments.cache, arguments.device)
        print(
            f"oracle: {sum(e is not None for e in expected)} greedy answers, "
            f"{time.monotonic() - started:.0f} s"
        )
    settings = [
        *SETTINGS,
        f"model.dtype={arguments.dtype}",
        "kvcache.num_blocks=2048",
        *PATIENT,
        *device_settings(arguments.device),
        *arguments.set,
    ]
    told = all_kinds(cases, config["vocab_size"])
    with (
        tempfile.TemporaryDirectory() as directory,
        MeshProcesses(arguments.model, Path(directory), num_engines=1, settings=settings) as mesh,
    ):
        promise, reference = asyncio.run(ask_alone(mesh.router_address, told))
    if promise is None and arguments.dtype != "float32":
        print(f"{arguments.dtype}: these engines promise no bits, so there is nothing to hold them to")
        return 2
    if promise is not None and expected:
        bad = mismatches(cases, expected, [answer.token_ids for answer in reference[: len(cases)]])
        wrong += len(bad)
        print(f"one engine, alone: {len(bad)} mismatches with transformers", *bad, sep="\n  ", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        mesh = MeshProcesses(
            arguments.model, Path(directory), num_engines=arguments.engines, settings=settings
        )
        with mesh:
            if promise is not None:
                print(f"bits, class {promise.name}", flush=True)
                wrong += asyncio.run(
                    check_bits(mesh, told, reference, strategies, dict.fromkeys(HARMS, harmed))
                )
            else:
                wrong += asyncio.run(
                    check(mesh.router_address, cases, expected, strategies, arguments.engines)
                )
    print("exact" if wrong == 0 else f"{wrong} MISMATCHES")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
