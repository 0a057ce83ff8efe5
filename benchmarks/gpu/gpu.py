"""What an engine reaches on a GPU, against ceilings measured in the same run, and whether that meets goals.

    python benchmarks/gpu/gpu.py [--device cuda:0] [--quick]
    python benchmarks/gpu/gpu.py --device cpu --tiny

A model in the shape of Llama-3.1-8B with random weights, bf16, is prefilled, decoded, sent to an engine in
another process on the same GPU, and migrated there; some 45 GB of its memory. Rows of the table:

    rates       of torch, in this run: one read, one copy, one matrix product, all far larger than the caches
    transfer    a prompt prefilled with its KV sent as it is computed, and another one without, by turns: what
                the sending adds to the prefill, and how long after its KV was computed the last layer had
                arrived over there, in times of one layer (of the last step, where a prompt takes several)
    decode      a step in which every sequence gets a token, scheduler and sampling included, against the
                least that it must read (weights and KV) at the rate of a read
    prefill     the operations of a prompt's matrices and its causal attention, against a matrix product
    migration   a context in the prefix cache until it is prefix cache over there, in times faster than
                computing it: its grant is asked for, its whole blocks are sent, and it is committed

Medians. Exit code 0 also where a goal is missed: this measures; 1 if something fails. Kernels alone are
measured by gpu_kernels.py. On a CPU the very same code runs over shared memory: to try it out.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import msgspec
import torch
from gpu_parts import timing
from gpu_parts.engine import BLOCK_SIZE, Engine, device_settings
from gpu_parts.plan import FULL, QUICK, TRIAL, Plan
from gpu_parts.receiver import Receiver
from gpu_parts.table import Goal, Row, counted, head, line, spent, summary

from microserve.kernels.kernel_cache import KernelUnavailable
from microserve.protocol.errors import MeshError
from microserve.protocol.logging.setup import configure
from microserve.protocol.settings.settings import LogSettings

ADDED_GOAL = Goal("<=", 0.02, "%")
ARRIVAL_GOAL = Goal("<=", 1.0, "layers")
PREFILL_GOAL = Goal(">=", 0.60, "%")
MIGRATION_GOAL = Goal(">=", 20.0, "x")


class Measurement:
    """One run: ``rows`` in the order of the table."""

    def __init__(self, plan: Plan, device: str, engine: Engine, receiver: Receiver) -> None:
        self._plan, self._shape = plan, plan.shape
        self._device = torch.device(device)
        self._engine, self._receiver = engine, receiver
        self._chance = random.Random(1)
        self._numbers = itertools.count()

    def rows(self) -> Iterator[Row]:
        plan, device = self._plan, self._device
        read_rate = plan.ceiling_nbytes / timing.read_seconds(device, plan.rounds, plan.ceiling_nbytes)
        copy_rate = 2 * plan.ceiling_nbytes / timing.copy_seconds(device, plan.rounds, plan.ceiling_nbytes)
        operations = 2 * plan.matmul_size**3
        matmul_rate = operations / timing.matmul_seconds(device, plan.rounds, plan.matmul_size)
        yield Row("read", plan.ceiling_nbytes, "B", counted(read_rate, "B/s"))
        yield Row("copy, read and written", 2 * plan.ceiling_nbytes, "B", counted(copy_rate, "B/s"))
        name = f"matrix product of {plan.matmul_size}"
        yield Row(name, operations, "FLOP", counted(matmul_rate, "FLOP/s"))
        for num_tokens, rounds in plan.transfers.items():
            yield from self._transfer(num_tokens, rounds)
        for batch_size, part in plan.decodes.items():
            yield self._decode(batch_size, Goal(">=", part, "%"), read_rate)
        yield self._prefill(matmul_rate)
        yield self._migration()

    def _transfer(self, num_tokens: int, rounds: int) -> Iterator[Row]:
        engine, receiver = self._engine, self._receiver
        clock = engine.clock_layers()
        plain, sending, late, layer = [], [], [], []
        for round_ in range(-1, rounds):  # the first one attaches and compiles, and does not count
            without = engine.prefill(self._prompt(num_tokens))
            prompt, request_id = self._prompt(num_tokens), f"transfer-{next(self._numbers)}"
            grant = receiver.prepare(request_id, prompt)
            receiver.send("watch", grant_id=grant.grant_id)
            elapsed, sent = engine.send(prompt, grant, sampling=True)
            computed_ns, step_ns = clock.computed_ns[-1], clock.step_ns
            engine.settle()
            arrived_ns = receiver.answer()[-1]
            receiver.ask("release", request_id=request_id, grant_id=grant.grant_id)
            self._require(
                sent.nbytes == num_tokens * self._shape.token_kv_nbytes, f"sent {sent.nbytes} bytes"
            )
            if round_ >= 0:
                plain.append(without)
                sending.append(elapsed)
                late.append((arrived_ns - computed_ns) / 1e9)
                layer.append(step_ns / 1e9 / self._shape.num_layers)
        engine.stop_clock(clock)
        what = f"transfer of {num_tokens} tokens"
        without, with_it = statistics.median(plain), statistics.median(sending)
        yield Row(
            *(f"{what}: added to the prefill", sent.nbytes, "B", spent(with_it), f"without {spent(without)}"),
            *(with_it / without - 1.0, ADDED_GOAL),
        )
        last, one = statistics.median(late), statistics.median(layer)
        yield Row(
            *(f"{what}: last layer's arrival", sent.nbytes, "B", spent(last), f"a layer {spent(one)}"),
            *(last / one, ARRIVAL_GOAL),
        )

    def _decode(self, batch_size: int, goal: Goal, read_rate: float) -> Row:
        plan = self._plan
        prompts = [self._prompt(plan.decode_context) for _ in range(batch_size)]
        times, num_context_tokens = self._engine.decode(prompts, plan.warm_up_steps, plan.decode_steps)
        # Contexts grow by a token a step: the mean of the bound goes with the median of the times.
        nbytes = self._shape.decode_nbytes(num_context_tokens // plan.decode_steps)
        elapsed, bound = statistics.median(times), nbytes / read_rate
        return Row(
            f"decode step, batch {batch_size}, context {plan.decode_context}",
            *(nbytes, "B", spent(elapsed), f"bound {spent(bound)}", bound / elapsed, goal),
        )

    def _prefill(self, matmul_rate: float) -> Row:
        num_tokens = self._plan.prefill_tokens
        times = [self._engine.prefill(self._prompt(num_tokens)) for _ in range(self._plan.rounds + 1)][1:]
        elapsed, operations = statistics.median(times), self._shape.prefill_operations(num_tokens)
        bound = operations / matmul_rate
        return Row(
            *(f"prefill of {num_tokens} tokens", operations, "FLOP", spent(elapsed)),
            *(f"bound {spent(bound)}", bound / elapsed, PREFILL_GOAL),
        )

    def _migration(self) -> Row:
        engine, receiver, num_tokens = self._engine, self._receiver, self._plan.migration_tokens
        num_whole = num_tokens - num_tokens % BLOCK_SIZE
        computing, moving = [], []
        for round_ in range(-1, self._plan.rounds):
            prompt, request_id = self._prompt(num_tokens), f"migration-{next(self._numbers)}"
            computed = engine.prefill(prompt)
            started_ns = time.monotonic_ns()
            grant = receiver.prepare(request_id, prompt[:num_whole])
            receiver.send("commit", request_id=request_id, grant_id=grant.grant_id)
            _, sent = engine.send(prompt[:num_whole], grant, sampling=False)
            engine.settle()
            moved_ns = receiver.answer() - started_ns
            self._require(sent.cached == num_whole, f"of {num_whole} tokens {sent.cached} were cached")
            if round_ >= 0:
                computing.append(computed)
                moving.append(moved_ns / 1e9)
        took, recomputing = statistics.median(moving), statistics.median(computing)
        return Row(
            f"migration of {num_whole} of {num_tokens} tokens",
            *(sent.nbytes, "B", spent(took), f"computing {spent(recomputing)}"),
            *(recomputing / took, MIGRATION_GOAL),
        )

    def _prompt(self, num_tokens: int) -> list[int]:
        vocab = self._shape.vocab
        return [self._chance.randrange(vocab) for _ in range(num_tokens)]

    def _require(self, is_right: bool, found: str) -> None:
        """A figure of work that was not done would be worse than none."""
        if not is_right:
            raise RuntimeError(f"not what was to be measured: {found}")


def measure(plan: Plan, device: str) -> Iterator[Row]:
    """Rows as they are measured. Raises :class:`MeshError` when an engine cannot be made, or fails."""
    with tempfile.TemporaryDirectory() as folder:
        model = plan.shape.write(Path(folder) / plan.shape.name)
        engine = Engine(
            *(model, device),
            num_blocks=plan.num_blocks,
            max_num_seqs=max(plan.decodes),
            max_num_batched_tokens=plan.step_tokens,
        )
        # Events and streams of torch are of its current device.
        with engine, nullcontext() if device == "cpu" else torch.cuda.device(device):
            layout = msgspec.structs.replace(engine.layout, num_blocks=plan.num_receiver_blocks)
            with Receiver(layout, device_settings(device), device) as receiver:
                yield from Measurement(plan, device, engine, receiver).rows()


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
        print("gpu: no CUDA device: nothing is measured")
        return 0
    configure("benchmark", "sender", LogSettings(level="warning"))
    print(timing.describe(torch.device(options.device)))
    if not is_judged:
        place = "with a tiny model" if is_gpu else "on a CPU"
        print(f"{place}: this tries the code out and measures nothing about GPUs")
    plan = TRIAL if options.tiny else QUICK if options.quick else FULL
    print(f"{plan.shape.name}, random weights, bf16", flush=True)
    rows: list[Row] = []
    print(head())
    try:
        for row in measure(plan, options.device):
            print(line(row, is_judged=is_judged), flush=True)
            rows.append(row)
    except (MeshError, KernelUnavailable) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 1
    print(summary(rows) if is_judged else "nothing about GPUs was measured")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
