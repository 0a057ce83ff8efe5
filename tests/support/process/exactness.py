"""Token-exactness of a real mesh against ``transformers``: the oracle of the whole project.

    python tests/support/process/exactness.py --model DIR [--requests 200] [--strategies a,b] [--cache FILE]

Starts real processes (index, router, engines) in fp32 and sends the same mixed requests under every strategy:
prompts of 1 to 2,000 tokens with shared prefixes, 16 in flight, greedy and seeded sampling. Greedy answers
must equal ``transformers`` ``generate`` one at a time; sampled ones those of the first strategy
(``data_parallel``). With ``--device cuda:0`` engines and oracle share that GPU. Prints one line a strategy;
exits 1 on any mismatch.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import QueueFull
from microserve.protocol.messages.sampling import SamplingParams
from microserve.services.router.strategies import BUILT_IN
from tests.support.bus.gateway_peer import BusClient
from tests.support.process.processes import MeshProcesses

STRATEGIES = [strategy.name for strategy in BUILT_IN]
SETTINGS = [
    # So that each strategy does all that it can do, also with short prompts.
    "router.strategies.balanced_adaptive.min_share=8",
    "router.strategies.elastic_roles={period_s=0.2,ttft_s=0.1,drain_s=1.0}",
    "router.strategies.kv_cost.temperature=0.5",
    "router.strategies.min_ttft.balance=1.0",
    "router.strategies.replicate_hot={depth=2,hot=1,period_s=0.2}",
]
IN_FLIGHT = 16


@dataclass(frozen=True)
class Case:
    prompt: tuple[int, ...]
    params: SamplingParams

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0


def make_cases(count: int, *, vocab_size: int, max_prompt: int, seed: int = 0) -> list[Case]:
    """Mixed lengths, a third with a shared prefix; two greedy for each sampled one."""
    rng = random.Random(seed)
    low = min(20, vocab_size // 4)
    prefixes = [
        tuple(rng.randrange(low, vocab_size) for _ in range(rng.randrange(max_prompt // 4, max_prompt // 2)))
        for _ in range(6)
    ]
    lengths = [1, 2, 15, 16, 17, 31, 32, 33, max_prompt]
    cases = []
    for number in range(count):
        if number < len(lengths):
            length = lengths[number]
        else:
            length = min(max_prompt, max(1, int(rng.lognormvariate(5.0, 1.3))))
        prompt = tuple(rng.randrange(low, vocab_size) for _ in range(length))
        if rng.random() < 0.35:
            prompt = (*rng.choice(prefixes), *prompt)[:max_prompt]
        params = SamplingParams(max_tokens=rng.randrange(4, 25), temperature=0.0, ignore_eos=True)
        if number % 3 == 2:
            params = SamplingParams(
                max_tokens=params.max_tokens,
                temperature=rng.choice([0.5, 0.8, 1.0]),
                top_p=rng.choice([0.9, 1.0]),
                top_k=rng.choice([0, 50]),
                seed=rng.randrange(1 << 40),
                ignore_eos=True,
            )
        cases.append(Case(prompt, params))
    return cases


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
    """All cases under one strategy, ``IN_FLIGHT`` at a time, in order of the list."""
    gate = asyncio.Semaphore(IN_FLIGHT)

    async def one(case: Case) -> list[int]:
        async with gate:
            while True:
                # A salt of its own: no strategy may live on what another one has cached.
                answer = await client.generate(
                    list(case.prompt), case.params, strategy=strategy, ttl_s=600.0, salt=strategy
                )
                if answer.result.code != QueueFull.code:
                    break
                # A strategy with a bound refuses what a slow machine would serve late: as a client would.
                await asyncio.sleep(answer.result.retry_after_s or 1.0)
            if answer.reason != "length":
                raise AssertionError(f"{strategy}: a request ended with {answer.ended}")
            return answer.token_ids

    return list(await asyncio.gather(*map(one, cases)))


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
    arguments = parser.parse_args()
    config = json.loads((arguments.model / "config.json").read_text())
    cases = make_cases(arguments.requests, vocab_size=config["vocab_size"], max_prompt=arguments.max_prompt)
    started = time.monotonic()
    expected = oracle(arguments.model, cases, arguments.cache, arguments.device)
    print(
        f"oracle: {sum(e is not None for e in expected)} greedy answers, {time.monotonic() - started:.0f} s"
    )
    with tempfile.TemporaryDirectory() as directory:
        mesh = MeshProcesses(
            arguments.model,
            Path(directory),
            num_engines=arguments.engines,
            settings=[
                *SETTINGS,
                "model.dtype=float32",
                "kvcache.num_blocks=2048",
                "bus.stuck_s=60",
                "router.call_timeout_s=300",  # sixteen long prompts on two slow engines wait their turn
                *device_settings(arguments.device),
            ],
        )
        with mesh:
            wrong = asyncio.run(
                check(
                    mesh.router_address, cases, expected, arguments.strategies.split(","), arguments.engines
                )
            )
    print("exact" if wrong == 0 else f"{wrong} MISMATCHES")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
