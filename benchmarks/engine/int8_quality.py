"""How far a model with int8 weights is from itself in bf16 and in fp32, on the same tokens of real text.

    python benchmarks/engine/int8_quality.py [--text FILE] [--tokens 2048] [--json]

Teacher forced: at every position the logits behind the text up to there. ``worst`` and ``mean``: absolute
differences of logits, over positions and vocabulary; ``greedy``: positions where the largest logit is the
same token's, ``decided``: of those where the other side's two largest are more than 0.1 apart; ``loss``: nats
a token. Text: this project's own pages, which the model has never seen.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from engine_parts.steps import BLOCK_SIZE, MAX_ROWS, Engine, demo_model
from tokenizers import Tokenizer

from microserve.services.engine.native.runner import NativeRunner

PAGE = Path(__file__).parents[2] / "docs" / "strategies.md"
DECIDED = 0.1
Logits = npt.NDArray[np.float32]


@dataclass
class Apart:
    """One side against another, over all positions so far."""

    worst: float = 0.0
    total: float = 0.0
    values: int = 0
    positions: int = 0
    greedy: int = 0
    decided: int = 0
    greedy_decided: int = 0

    def add(self, here: Logits, there: Logits) -> None:
        apart = np.abs(here - there)
        self.worst = max(self.worst, float(apart.max()))
        self.total += float(apart.sum(dtype=np.float64))
        self.values += apart.size
        second, first = np.partition(there, (-2, -1), axis=1)[:, -2:].T
        same, decided = here.argmax(axis=1) == there.argmax(axis=1), first - second > DECIDED
        self.positions += len(here)
        self.greedy += int(same.sum())
        self.decided += int(decided.sum())
        self.greedy_decided += int((same & decided).sum())


def losses(logits: Logits, following: npt.NDArray[np.int64]) -> float:
    """The sum over positions that are followed by something."""
    rows = logits[: len(following)].astype(np.float64)
    top = rows.max(axis=1)
    sums = np.log(np.exp(rows - top[:, None]).sum(axis=1)) + top
    return float((sums - rows[np.arange(len(following)), following]).sum())


def logits_of(runner: NativeRunner, ids: npt.NDArray[np.int64], start: int, first_block: int) -> Logits:
    """Of the next chunk, whose KV stays in blocks of this side's own."""
    end = min(start + MAX_ROWS, len(ids))
    at, table = np.arange(start, end), list(range(first_block, first_block + -(-end // BLOCK_SIZE)))
    slots = at + first_block * BLOCK_SIZE
    return runner.step.run(ids[start:end], at, slots, [(end - start, end, table)], np.arange(end - start))


def measure(model: str, text: str, num_tokens: int, threads: int) -> dict[str, object]:
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens], np.int64)
    halves, whole = Engine(model, "bfloat16"), Engine(model, "float32")
    runners = {
        "bfloat16": halves.native(threads),
        "int8": halves.native(threads, weights="int8"),
        "float32": whole.native(threads),
    }
    first_blocks = {"bfloat16": 0, "int8": -(-len(ids) // BLOCK_SIZE), "float32": 0}
    pairs = [("int8", "bfloat16"), ("int8", "float32"), ("bfloat16", "float32")]
    apart, loss = {pair: Apart() for pair in pairs}, dict.fromkeys(runners, 0.0)
    for start in range(0, len(ids), MAX_ROWS):
        found = {name: logits_of(each, ids, start, first_blocks[name]) for name, each in runners.items()}
        for here, there in pairs:
            apart[here, there].add(found[here], found[there])
        for name, logits in found.items():
            loss[name] += losses(logits, ids[start + 1 : start + 1 + len(logits)])
    rows = [
        {
            "side": here,
            "against": there,
            "worst": round(each.worst, 4),
            "mean": round(each.total / each.values, 5),
            "greedy": each.greedy / each.positions,
            "decided": each.greedy_decided / max(each.decided, 1),
            "num_decided": each.decided,
        }
        for (here, there), each in apart.items()
    ]
    told = {name: round(total / max(len(ids) - 1, 1), 5) for name, total in loss.items()}
    return {"num_tokens": len(ids), "rows": rows, "loss": told}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--text", type=Path, default=PAGE)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="600 tokens.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    num_tokens = 600 if options.quick else options.tokens
    text = options.text.read_text(encoding="utf-8")
    told = measure(demo_model(options.model), text, num_tokens, options.threads)
    if options.json:
        print(json.dumps(told))
        return
    print(f"{told['num_tokens']} tokens; loss: {told['loss']}")
    print(f"{'':<10}{'against':<10}{'worst':>9}{'mean':>10}{'greedy':>9}{'decided':>9}")
    for row in told["rows"]:  # type: ignore[attr-defined]
        shares = f"{row['greedy']:>9.2%}{row['decided']:>9.2%}"
        print(f"{row['side']:<10}{row['against']:<10}{row['worst']:>9}{row['mean']:>10}{shares}")


if __name__ == "__main__":
    main()
