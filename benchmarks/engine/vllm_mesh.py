"""One vLLM behind the mesh beside ``vllm serve`` alone, over HTTP, in turns: tokens a second and first token.

    python benchmarks/engine/vllm_mesh.py [--rounds 5] [--streams 1,8] [--python .vllm/bin/python] [--json]

The same requests to both: prompts of 128 tokens that nobody has seen, greedy, ``ignore_eos``, bfloat16, one
thread each. Counted is the part in which every stream decodes; ``first token``: mean of the streams, from
their being sent. Both sides stay up. share: mesh / alone, round by round; without vLLM's environment it is a
line and no figure.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from engine_parts.serving import Mesh, Prompts, mesh, steady
from engine_parts.spread import Spread, ratios
from engine_parts.steps import demo_model

from microserve.services.local.composition import free_ports

ROOT = Path(__file__).resolve().parents[2]
PROMPT_TOKENS, BLOCK_SIZE, KV_MB, MAX_MODEL_LEN = 128, 32, 256, 2048
MAX_NUM_SEQS, MAX_NUM_BATCHED_TOKENS = 64, 512
START_S = 600.0


@contextmanager
def alone(python: Path, model: str) -> Iterator[Mesh]:
    """``vllm serve`` with what the engine of the mesh has. Raises :class:`RuntimeError` with what it said."""
    [port] = free_ports(1)
    words = (
        f"--served-model-name bench --host 127.0.0.1 --port {port} --dtype bfloat16 --block-size {BLOCK_SIZE}"
    )
    words += f" --kv-cache-memory-bytes {KV_MB << 20} --max-model-len {MAX_MODEL_LEN} --enforce-eager"
    words += f" --max-num-seqs {MAX_NUM_SEQS} --max-num-batched-tokens {MAX_NUM_BATCHED_TOKENS}"
    command = [str(python), "-P", "-m", "vllm.entrypoints.cli.main", "serve", model, *words.split()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, stdin=subprocess.DEVNULL, process_group=0
        )
        try:
            until = time.monotonic() + START_S
            while not _answers(f"http://127.0.0.1:{port}/health"):
                if child.poll() is not None or time.monotonic() > until:
                    output.seek(0)
                    raise RuntimeError(output.read()[-4000:].decode(errors="replace"))
                time.sleep(0.2)
            yield Mesh(f"http://127.0.0.1:{port}")
        finally:
            child.terminate()
            try:
                child.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return bool(response.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument(
        "--python", type=Path, default=ROOT / ".vllm/bin/python", help="Of vLLM's environment."
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", default="1,8")
    parser.add_argument("--tokens", type=int, default=64, help="Of each stream.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    python = options.python.absolute()
    if not python.exists():
        print(f"no figures: {python} is not there (`make vllm` makes it)")
        return
    model, counts = demo_model(options.model), [int(each) for each in options.streams.split(",")]
    prompts = Prompts(model, seed=3)
    settings = [
        "engine.backend=vllm",
        f"vllm.python={python}",
        f"kvcache.block_size={BLOCK_SIZE}",
        "kvcache.num_blocks=0",
        f"vllm.kv_cache_mb={KV_MB}",
        "vllm.enforce_eager=true",
        f"engine.max_model_len={MAX_MODEL_LEN}",
        f"engine.max_num_seqs={MAX_NUM_SEQS}",
        f"engine.max_num_batched_tokens={MAX_NUM_BATCHED_TOKENS}",
        f"mesh.ready_timeout_s={START_S}",
    ]
    rates: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in counts}
    firsts: dict[int, tuple[list[float], list[float]]] = {count: ([], []) for count in counts}
    with ExitStack() as stack:
        sides = [stack.enter_context(alone(python, model))]
        sides.insert(0, stack.enter_context(mesh(model, 1, 1, "bfloat16", *settings)))
        for turn in range(-1, options.rounds):
            for count in counts:
                asked = prompts.draw(count, PROMPT_TOKENS)
                for number in (0, 1) if turn % 2 else (1, 0):
                    found = steady(sides[number].play(asked, options.tokens))
                    if turn >= 0:  # before: what is done once
                        rates[count][number].append(found.tokens_per_s)
                        firsts[count][number].append(found.first_token_s * 1e3)
    rows = [
        {
            "streams": count,
            "mesh_tokens_per_s": Spread.of(rates[count][0]).as_json(),
            "alone_tokens_per_s": Spread.of(rates[count][1]).as_json(),
            "share": ratios(*rates[count]).as_json(),
            "mesh_first_token_ms": Spread.of(firsts[count][0]).as_json(),
            "alone_first_token_ms": Spread.of(firsts[count][1]).as_json(),
        }
        for count in counts
    ]
    if options.json:
        print(json.dumps({"rounds": options.rounds, "rows": rows}))
        return
    for row in rows:
        names = [name for name in row if name != "streams"]
        said = ", ".join(f"{name.replace('_', ' ')} {Spread(*row[name])}" for name in names)  # type: ignore[misc]
        print(f"{row['streams']} streams: {said}")


if __name__ == "__main__":
    main()
