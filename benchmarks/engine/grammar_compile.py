"""How long a schema takes: the gateway's check, and the engine's compilation with its first mask.

    python benchmarks/engine/grammar_compile.py [--corpus DIR] [--count 50] [--rounds 3]

Schemas: the longest ``--count`` of the tools in recorded answers of models (the development extra
``canitoolcall``), or those of a directory of JSON files, each a schema or an object with a ``schema``. By the
demo model's vocabulary, each schema once a round; times in ms, of the wall. Both sides keep what they have
compiled, so that a schema costs this once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles

from engine_parts.steps import demo_model

from microserve.gateway.grammar.checking import checked
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.compiled import load_tokenizer
from microserve.protocol.messages.request.sampling import Grammar
from microserve.services.engine.guidance.pool import compiler_of


def of_tools() -> Iterator[str]:
    import canitoolcall

    for file in sorted(Path(canitoolcall.__file__).parent.glob("_data/fixtures/*/*.jsonl")):
        for line in file.read_text().splitlines():
            for tool in json.loads(line).get("tools") or []:
                if schema := tool.get("function", tool).get("parameters"):
                    yield json.dumps(schema)


def of_directory(directory: Path) -> Iterator[str]:
    for file in sorted(directory.rglob("*.json")):
        content = json.loads(file.read_text())
        yield json.dumps(content.get("schema", content))


def line(name: str, times_ms: list[float]) -> str:
    parts = quantiles(times_ms, n=100, method="inclusive")
    p50, p90, p99 = parts[49], parts[89], parts[98]
    return f"{name:28} p50 {p50:7.2f}  p90 {p90:7.2f}  p99 {p99:7.2f}  max {max(times_ms):7.2f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="")
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    directory = Path(demo_model(options.model))
    vocab_size = json.loads((directory / "config.json").read_text())["vocab_size"]
    found = of_tools() if options.corpus is None else of_directory(options.corpus)
    schemas = sorted(set(found), key=len, reverse=True)[: options.count]
    tokenizer = load_tokenizer(directory)
    compiler = compiler_of(directory, vocab_size, frozenset({2}))
    compiler.compile(Grammar(kind="json_object"))  # the vocabulary is read by the first one
    check_ms: list[float] = []
    compile_ms: list[float] = []
    num_refused = 0
    for _ in range(options.rounds):
        for schema in schemas:
            began = time.perf_counter()
            try:
                grammar, _ = checked(tokenizer, Grammar(kind="json_schema", text=schema), is_strict=False)
            except InvalidRequest:
                num_refused += 1
                continue
            then = time.perf_counter()
            check_ms.append((then - began) * 1e3)
            compiler.compile(grammar).mask()
            compile_ms.append((time.perf_counter() - then) * 1e3)
    lengths = sorted(map(len, schemas))
    print(
        f"{len(schemas)} schemas of {lengths[0]} to {lengths[-1]} characters, {options.rounds} rounds, "
        f"{num_refused // options.rounds} refused"
    )
    print(line("check of the gateway", check_ms))
    print(line("compilation and first mask", compile_ms))


if __name__ == "__main__":
    main()
