"""Prompts that one vLLM computes and another one decodes: the mesh beside vLLM's own NIXL connector.

    python benchmarks/engine/vllm_pair.py [--rounds 5] [--pairs 6] [--python .vllm/bin/python] [--json]
        [--nixl-python PYTHON]      of an environment with vLLM and NIXL; default: that of --python

Prompts of 700 tokens that nobody has seen, one at a time, each on both sides one right after the other;
greedy, eager, bfloat16, four engines of one thread (``engine_parts/vllm_server.py``), all of them up; NIXL's,
whose agents turn a core each at rest, stand still (SIGSTOP) while the mesh is asked. The mesh's side is its
gateway with strategy ``disaggregated``. The other one is vLLM's own way: its proxy's logic
without the proxy, which would cost a hop more: the prompt goes to the producer for one token, and what that
answers in ``kv_transfer_params`` to the consumer, which pulls the KV. Milliseconds, medians with intervals of
95 %:

    computed    from the prompt's being computed to the first token that the receiver has computed: of the
                mesh, whose sender samples the first token, that is the second one
    hand off    the same from the last put on (the phases of the gateway's canonical line say when both were);
                of NIXL the consumer's own mean of a pull is printed, which is a part of *computed*
    line        ``admitted`` + ``first_token`` of that line: last put to the sender's token, 0 where it came
                before
    step        one decode step of the same streams, the mean from their second token to their last
    over        hand off less a step, prompt by prompt; goal: 5 ms at most. Of NIXL: computed less a step

Without vLLM's environment it is a line and no figure; without NIXL the mesh's side alone.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import time
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine_parts.serving import TIMEOUT_S, Mesh, Prompts, Stream, connect, mesh
from engine_parts.spread import Spread, differences, of_median, ratios
from engine_parts.steps import demo_model
from engine_parts.vllm_server import PYTHON, Server, Shape, has_module, metrics_of, rest, vllm_serve

from microserve.protocol.messages.router import PHASES
from microserve.services.local.composition import free_ports

PROMPT_TOKENS, SHAPE = 700, Shape(max_num_batched_tokens=1024)
OURS, NIXL = "mesh", "nixl"
BEFORE = PHASES[: PHASES.index("transferred")]
"""Phases of a canonical line until the sender has computed."""
PULLS = "vllm:nixl_xfer_time_seconds"

Taken = dict[str, list[float]]
"""Milliseconds by name, in the order of the prompts."""


def common(stream: Stream, into: Taken) -> float:
    """What is measured of any stream. The step is returned, a mean: tokens may come several at a time."""
    first, second = stream.times[:2]
    step_ms = (stream.times[-1] - second) / (stream.num_tokens - 2) * 1e3
    into["first_token"].append(first * 1e3)
    into["second_token"].append(second * 1e3)
    into["step"].append(step_ms)
    return step_ms


@dataclass
class Ours:
    mesh: Mesh
    others: list[Server]

    def ask(self, prompt: list[int], num_tokens: int, into: Taken) -> None:
        with ExitStack() as stack:
            for other in self.others:
                stack.enter_context(other.stopped())
            self._ask(prompt, num_tokens, into)

    def _ask(self, prompt: list[int], num_tokens: int, into: Taken) -> None:
        [stream] = self.mesh.play([prompt], num_tokens)
        line = self._line(len(into["step"]))
        step_ms = common(stream, into)
        computed_s = sum(line[f"{phase}_s"] for phase in BEFORE)
        put_s = computed_s + line["transferred_s"]
        into["computed"].append((stream.times[1] - computed_s) * 1e3)
        into["hand_off"].append((stream.times[1] - put_s) * 1e3)
        into["line"].append((line["admitted_s"] + line["first_token_s"]) * 1e3)
        into["over"].append(into["hand_off"][-1] - step_ms)

    def _line(self, number: int) -> dict[str, Any]:
        """Of the request that has just ended; it is written when the client has its answer already."""
        until = time.monotonic() + TIMEOUT_S
        while len(lines := self.mesh.finished()) <= number:
            if time.monotonic() > until:
                raise RuntimeError("the gateway has no line of a request")
            time.sleep(0.01)
        line = lines[number]
        if line["received_tokens"] == 0:
            raise RuntimeError(f"no KV was sent: {line}")
        return line


@dataclass
class Nixl:
    producer: Mesh
    consumer: Mesh

    def ask(self, prompt: list[int], num_tokens: int, into: Taken) -> None:
        computed_s, stream = asyncio.run(self._ask(prompt, num_tokens))
        step_ms = common(stream, into)
        computed_ms = (stream.times[0] - computed_s) * 1e3
        into["computed"].append(computed_ms)
        into["over"].append(computed_ms - step_ms)

    async def _ask(self, prompt: list[int], num_tokens: int) -> tuple[float, Stream]:
        """When the producer had answered, and the consumer's stream, both since the request."""
        host, _, port = self.producer.url.rpartition("/")[2].rpartition(":")
        first, then = http.client.HTTPConnection(host, int(port)), await connect(self.consumer.url)
        first.connect()
        asks: dict[str, object] = {"do_remote_decode": True, "do_remote_prefill": False}
        asks |= dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
        body = {"model": "bench", "prompt": prompt, "max_tokens": 1, "temperature": 0.0, "ignore_eos": True}
        content = json.dumps(body | {"kv_transfer_params": asks})
        began = time.perf_counter()
        first.request("POST", "/v1/completions", content, {"content-type": "application/json"})
        answer = json.loads(first.getresponse().read())
        computed_s = time.perf_counter() - began
        first.close()
        if not (answer.get("kv_transfer_params") or {}).get("remote_block_ids"):
            raise RuntimeError(f"the producer offers no KV: {answer}")
        then.ask(prompt, num_tokens, kv_transfer_params=answer["kv_transfer_params"])
        return computed_s, (await then.answer()).stream(began, num_tokens)

    def pulls(self) -> tuple[float, float]:
        """How many, and the seconds that they took in all, as the consumer counts them."""
        found = metrics_of(self.consumer.url, PULLS)
        return found.get(f"{PULLS}_count", 0.0), found.get(f"{PULLS}_sum", 0.0)


def nixl_pair(stack: ExitStack, python: Path, model: str) -> list[Server]:
    """Both servers, starting."""
    servers: list[Server] = []
    for role in ("kv_producer", "kv_consumer"):
        told = json.dumps({"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"})
        [side] = free_ports(1)
        environment = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(side)}
        more = ("--kv-transfer-config", told)
        servers.append(
            stack.enter_context(
                vllm_serve(python, model, SHAPE, *more, environment=environment, has_stats=True)
            )
        )
    return servers


def rows_of(taken: dict[str, Taken]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = [
        {"side": side, **{name: of_median(values).as_json() for name, values in found.items()}}
        for side, found in taken.items()
    ]
    if NIXL in taken:
        ours, theirs = taken[OURS], taken[NIXL]
        shared = ("first_token", "second_token", "computed", "step")
        row: dict[str, object] = {"side": "mesh / nixl"}
        row |= {name: ratios(ours[name], theirs[name], of_median).as_json() for name in shared}
        less = {f"{name}_less": differences(ours[name], theirs[name]).as_json() for name in shared[:3]}
        rows.append(row | less)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--python", type=Path, default=PYTHON, help="Of vLLM's environment.")
    parser.add_argument("--nixl-python", type=Path, help="Of one with NIXL as well.  [default: --python]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=6, help="Prompts a round.")
    parser.add_argument("--tokens", type=int, default=24, help="Of each stream.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    python = options.python.absolute()
    if not python.exists():
        print(f"no figures: {python} is not there (`make vllm` makes it)")
        return
    with_nixl = (options.nixl_python or python).absolute()
    has_nixl = has_module(with_nixl, "nixl")
    model = demo_model(options.model)
    prompts, taken = Prompts(model, seed=5), {OURS: defaultdict[str, list[float]](list)}
    settings = [*SHAPE.settings(python), "router.default_strategy=disaggregated"]
    num_pulls = pull_s = 0.0
    with ExitStack() as stack:
        servers = nixl_pair(stack, with_nixl, model) if has_nixl else []
        sides: list[tuple[str, Ours | Nixl]] = [
            (OURS, Ours(stack.enter_context(mesh(model, 2, 1, "bfloat16", *settings)), servers))
        ]
        if servers:
            theirs = Nixl(*(server.ready() for server in servers))
            sides.append((NIXL, theirs))
            taken[NIXL] = defaultdict(list)
        for number in range(options.rounds + 1):
            for place, prompt in enumerate(prompts.draw(options.pairs, PROMPT_TOKENS)):
                for side, asked in sides if place % 2 else sides[::-1]:
                    rest()
                    asked.ask(prompt, options.tokens, taken[side])
            if not number and servers:  # that round was for what is done once
                num_pulls, pull_s = theirs.pulls()
        if servers:
            count, seconds = theirs.pulls()
            num_pulls, pull_s = count - num_pulls, seconds - pull_s
    for found in taken.values():
        for values in found.values():
            del values[: options.pairs]
    rows = rows_of(taken)
    pull_ms = float(f"{1e3 * pull_s / num_pulls:.3g}") if num_pulls else 0.0
    if options.json:
        told = {"rounds": options.rounds, "pairs": options.pairs, "has_nixl": has_nixl, "pull_ms": pull_ms}
        print(json.dumps(told | {"rows": rows}))
        return
    for row in rows:
        side, *cells = row.items()
        said = ", ".join(f"{name.replace('_', ' ')} {Spread(*cell)}" for name, cell in cells)  # type: ignore[misc]
        print(f"{side[1]}: {said}")
    if has_nixl:
        print(f"nixl: a pull takes {pull_ms:g} ms by its own count of {num_pulls:g}; of computed")
    else:
        print(f"no NIXL in {with_nixl}: pip install --no-deps nixl-cu12==1.5.1 nixl==1.5.1")


if __name__ == "__main__":
    main()
