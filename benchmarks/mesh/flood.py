"""What a key that floods costs the others: time to their first tokens, alone and beside it, in one run.

    python benchmarks/mesh/flood.py [--model DIR] [--seconds 15] [--rounds 2]

A mesh of real processes (`microserve up`, one engine), four keys with one client each that asks now and then,
and one key whose 50 clients ask again as soon as they are answered or, refused, after a quarter of a second.
The flood runs in a process of its own, so that the others' clock is not its loop; it does take CPU time that
the mesh would have had, at the lowest priority. Prints a JSON line for each phase and the ratios.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from microserve.services.local.demo.model import default_cache, fetch

NUM_OTHERS, NUM_FLOODS = 4, 50
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 8
PAUSE_S, REFUSED_S = 0.3, 0.25
RELOAD_S = 2.5
"""For the gateway to take other limits."""
LIMITS: list[dict[str, Any]] = [{"concurrent_streams": 1}, {"requests_per_minute": 60}, {}]
"""Of the flood. Each other key has one stream, and asks about twice a second."""
MICROSERVE = [sys.executable, "-P", "-m", "microserve.services"]


async def ask(port: int, key: str, rng: random.Random) -> float | None:
    """Seconds to the first token of a stream; None when it was refused."""
    prompt = [rng.randrange(10, 200) for _ in range(PROMPT_TOKENS)]
    body = {
        "model": "bench",
        "prompt": prompt,
        "max_tokens": OUTPUT_TOKENS,
        "stream": True,
        "ignore_eos": True,
    }
    content = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {key}\r\nconnection: close\r\n"
    began = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        answer, first_s = await reader.readuntil(b"\r\n\r\n"), None
        if not answer.startswith(b"HTTP/1.1 200"):
            return None
        while line := await reader.readline():
            if first_s is None and line.startswith(b"data: "):
                first_s = time.monotonic() - began
        return first_s
    finally:
        writer.close()


async def others(port: int, seconds: float) -> dict[str, float]:
    """Of all their requests, in milliseconds."""
    ttfts: list[float] = []

    async def client(number: int) -> None:
        rng, ends = random.Random(number), time.monotonic() + seconds
        while time.monotonic() < ends:
            first_s = await ask(port, f"key-{number}", rng)
            assert first_s is not None, "refused"
            ttfts.append(first_s * 1000)
            await asyncio.sleep(rng.expovariate(1 / PAUSE_S))

    await asyncio.gather(*map(client, range(NUM_OTHERS)))
    ttfts.sort()
    p50, p90 = statistics.median(ttfts), ttfts[int(0.9 * len(ttfts))]
    return {"requests": len(ttfts), "p50": p50, "mean": statistics.fmean(ttfts), "p90": p90}


async def flood(port: int, seconds: float) -> dict[str, int]:
    counts = {"served": 0, "refused": 0}
    ends = time.monotonic() + seconds

    async def client(number: int) -> None:
        rng = random.Random(1000 + number)
        await asyncio.sleep(rng.random() * REFUSED_S)
        while time.monotonic() < ends:
            first_s = await ask(port, "flood", rng)
            counts["served" if first_s is not None else "refused"] += 1
            if first_s is None:
                await asyncio.sleep(REFUSED_S)

    await asyncio.gather(*map(client, range(NUM_FLOODS)))
    return counts


def write_keys(path: Path, limits: dict[str, Any]) -> None:
    names: dict[str, dict[str, Any]] = {f"key-{number}": {} for number in range(NUM_OTHERS)} | {
        "flood": limits
    }
    keys = (ApiKey(name=name, sha256=(digest_of(name),), **own) for name, own in names.items())
    path.write_text("".join(map(entry_of, keys)))


def measure(port: int, keys: Path, seconds: float, rounds: int) -> None:
    for limits in LIMITS:
        write_keys(keys, limits)
        time.sleep(RELOAD_S)
        for _ in range(rounds):
            alone = asyncio.run(others(port, seconds))
            command = ["nice", "-n", "19", sys.executable, __file__, "--flood", str(port)]
            command += ["--seconds", str(seconds + 1)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                time.sleep(1.0)
                beside = asyncio.run(others(port, seconds))
                counts = json.loads(process.communicate()[0])
            ratio = {name: round(beside[name] / alone[name], 2) for name in ("p50", "mean", "p90")}
            line = {"limits": limits, "ratio": ratio, "alone_ms": alone, "beside_ms": beside}
            print(json.dumps({**line, "flood": counts}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--flood", type=int, metavar="PORT")
    options = parser.parse_args()
    if options.flood:
        print(json.dumps(asyncio.run(flood(options.flood, options.seconds))))
        return
    with tempfile.TemporaryDirectory() as folder:
        keys, mesh = Path(folder) / "keys.toml", Path(folder) / "mesh"
        write_keys(keys, {})
        model = options.model or fetch(default_cache(os.environ))
        settings = [f"model.path={model}", "model.name=bench", f"gateway.api_keys_file={keys}"]
        settings += ["index.address=tcp://127.0.0.1:0", "router.address=tcp://127.0.0.1:0", "gateway.port=0"]
        flags = [word for each in settings for word in ("--set", each)]
        up = [*MICROSERVE, "up", "--detach", "--no-demo", "--engines", "1", "--directory", str(mesh), *flags]
        subprocess.run(up, check=True, stdout=subprocess.DEVNULL)
        try:
            state = json.loads((mesh / "mesh.json").read_text())
            measure(int(state["url"].rpartition(":")[2]), keys, options.seconds, options.rounds)
        finally:
            subprocess.run([*MICROSERVE, "down", "--directory", str(mesh)], check=True)


if __name__ == "__main__":
    main()
