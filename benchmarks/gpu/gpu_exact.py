"""What exact bits cost on a GPU: an engine with ``engine.cuda_exact`` and one without, by turns in one run.

    python benchmarks/gpu/gpu_exact.py [--device cuda:0] [--quick]
    python benchmarks/gpu/gpu_exact.py --device cpu --tiny

Both have a model in the shape of Llama-3.1-8B with random weights, bf16, on the same GPU; some 55 GB of its
memory. A row for each decode step (scheduler and sampling included, from CUDA graphs) and for a prefill: the
medians of both, and how many times as long the exact one takes. The goal is the least that is known of others
(SGLang's deterministic mode: 34 % of the throughput, so 1.5 times as long). Exit code 0 also where it is
missed: this measures. On a CPU both sides are the same, as exact kernels need a GPU: to try the code out.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from gpu_parts import timing
from gpu_parts.engine import Engine
from gpu_parts.plan import FULL, QUICK, TRIAL, Plan
from gpu_parts.table import Goal, Row, head, line, spent, summary

from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.protocol.errors import MeshError
from microserve.protocol.logging.setup import configure
from microserve.protocol.settings.settings import LogSettings

GOAL = Goal("<=", 1.5, "x")
TURNS = 3
"""Of decode steps: each side begins anew as often."""


def measure(plan: Plan, device: str) -> Iterator[Row]:
    """Rows as they are measured. Raises :class:`MeshError` when an engine cannot be made, or fails."""
    chance = random.Random(1)

    def prompt(num_tokens: int) -> list[int]:
        return [chance.randrange(plan.shape.vocab) for _ in range(num_tokens)]

    def engine(*, is_exact: bool) -> Engine:
        return Engine(
            *(model, device),
            num_blocks=plan.num_blocks,
            max_num_seqs=max(plan.decodes),
            max_num_batched_tokens=plan.step_tokens,
            is_exact=is_exact and device != "cpu",
        )

    with tempfile.TemporaryDirectory() as folder:
        model = plan.shape.write(Path(folder) / plan.shape.name)
        with engine(is_exact=False) as plain, engine(is_exact=True) as exact:
            for batch_size in plan.decodes:
                times: dict[Engine, list[float]] = {plain: [], exact: []}
                num_context_tokens = 0
                for _ in range(TURNS):
                    for side, found in times.items():
                        prompts = [prompt(plan.decode_context) for _ in range(batch_size)]
                        took, num_context_tokens = side.decode(prompts, plan.warm_up_steps, plan.decode_steps)
                        found.extend(took)
                nbytes = plan.shape.decode_nbytes(num_context_tokens // plan.decode_steps)
                what = f"decode step, batch {batch_size}, context {plan.decode_context}"
                yield _row(what, nbytes, "B", times[plain], times[exact])
            prefills: dict[Engine, list[float]] = {plain: [], exact: []}
            for round_ in range(-1, plan.rounds):  # the first one may compile, and does not count
                for side, found in prefills.items():
                    took_s = side.prefill(prompt(plan.prefill_tokens))
                    if round_ >= 0:
                        found.append(took_s)
            operations = plan.shape.prefill_operations(plan.prefill_tokens)
            what = f"prefill of {plan.prefill_tokens} tokens"
            yield _row(what, operations, "FLOP", prefills[plain], prefills[exact])


def _row(what: str, amount: int, unit: Literal["B", "FLOP"], plain: list[float], exact: list[float]) -> Row:
    without, with_it = statistics.median(plain), statistics.median(exact)
    return Row(
        *(what, amount, unit, spent(with_it)),
        ceiling=f"plain {spent(without)}",
        share=with_it / without,
        goal=GOAL,
    )


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", default="cuda:0", help="cuda:N, or cpu with --tiny")
    parser.add_argument("--tiny", action="store_true", help="a model of three small layers, short prompts")
    parser.add_argument("--quick", action="store_true", help="few rounds")
    options = parser.parse_args(arguments)
    is_gpu = options.device != "cpu"
    is_judged = is_gpu and not options.tiny
    if not is_gpu and not options.tiny:
        parser.error("--device cpu needs --tiny")
    if is_gpu and not torch.cuda.is_available():
        print("gpu_exact: no CUDA device: nothing is measured")
        return 0
    configure("benchmark", "exact", LogSettings(level="warning"))
    print(timing.describe(torch.device(options.device)))
    if not is_gpu:
        print("on a CPU: both sides are the same, and nothing is measured about GPUs")
    plan = TRIAL if options.tiny else QUICK if options.quick else FULL
    print(f"{plan.shape.name}, random weights, bf16", flush=True)
    rows: list[Row] = []
    print(head())
    try:
        for row in measure(plan, options.device):
            print(line(row, is_judged=is_judged), flush=True)
            rows.append(row)
    except (MeshError, KernelUnavailable) as error:
        print(f"gpu_exact: {error}", file=sys.stderr)
        return 1
    print(summary(rows) if is_judged else "nothing about GPUs was measured")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
