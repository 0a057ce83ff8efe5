"""How fast codecs make a model's KV smaller, and by how much: beside zstd of the same bytes, and a copy.

    python benchmarks/codec.py [--text FILE] [--tokens 1024] [--rounds 9] [--numpy] [--json]

KV of real text (this project's own pages) by the demo model in bf16, layer by layer, payloads of all of its
tokens. MB/s: raw KV over CPU time of one thread, the median of rounds in which all take turns; ``ratio``: raw
bytes over payloads' bytes, headers and scales among them; ``off``: relative error of K and of V, in the L2
norm. Low heads of mixed profiles are drawn by lot here: which they are changes ``off`` and not the cost.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import zstandard
from tokenizers import Tokenizer

from microserve.kvcache.codec import codec
from microserve.kvcache.codec.codec import Codec, decode
from microserve.kvcache.codec.profile import LOSSLESS, NONE, Levels, Profile
from microserve.kvcache.codec.steps import body
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.geometry import Geometry
from microserve.services.engine.model.model import load_model
from microserve.services.engine.native.packing import native_runner
from microserve.services.local.demo.model import default_cache, fetch

BLOCK_SIZE, MAX_ROWS = 16, 512
PAGE = Path(__file__).resolve().parents[1] / "docs" / "strategies.md"
Rows = npt.NDArray[np.uint8]
HIGH, MIXED = (Levels(12), Levels(10)), (Levels(12, 6), Levels(10, 4))
PROFILES = [
    NONE,
    *LOSSLESS,
    *(
        Profile(f"uniform-16-{coder}", "none", "uniform", Levels(16), Levels(16), coder=coder)
        for coder in ("pack", "zstd", "rans")
    ),
    Profile("uniform-12/10-rans", "none", "uniform", *HIGH, coder="rans"),
    Profile("hadamard-12/10-rans", "hadamard", "uniform", *HIGH, coder="rans"),
    Profile("mixed-h80-12/10-6/4-rans", "none", "mixed_head", *MIXED, 0.8, "rans"),
    Profile("mixed-h80-12/10-6/4-zstd", "none", "mixed_head", *MIXED, 0.8, "zstd"),
    Profile("mixed-l33-12/10-6/4-rans", "none", "mixed_layer", *MIXED, 0.33, "rans"),
    Profile("uniform-256-pack", "none", "uniform", Levels(256), Levels(256), coder="pack"),
]


@dataclass
class Side:
    """One row of the table; times in seconds, of all layers, a round each."""

    name: str
    nbytes: int = 0
    off: tuple[float, float] = (0.0, 0.0)
    encode_s: list[float] = field(default_factory=list)
    decode_s: list[float] = field(default_factory=list)

    def row(self, raw: int) -> dict[str, object]:
        speeds = [raw / statistics.median(each) / 1e6 for each in (self.encode_s, self.decode_s)]
        return {
            "name": self.name,
            "ratio": round(raw / self.nbytes, 3),
            "encode_mb_s": round(speeds[0]),
            "decode_mb_s": round(speeds[1]),
            "off_keys": round(self.off[0], 4),
            "off_values": round(self.off[1], 4),
        }


def kv_of(model: str, text: str, num_tokens: int) -> tuple[Geometry, Rows]:
    """[layers][K | V][tokens, bytes] of that many tokens of the text."""
    tokenizer = Tokenizer.from_file(str(Path(model) / "tokenizer.json"))
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids[:num_tokens], np.int64)
    loaded, table = load_model(model, dtype="bfloat16"), list(range(-(-len(ids) // BLOCK_SIZE)))
    spec = loaded.spec
    layout = KvLayout(
        spec.name, spec.num_layers, len(table), BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, spec.dtype
    )
    pool = np.zeros(layout.data_nbytes, np.uint8)
    step = native_runner(loaded, pool, len(table), BLOCK_SIZE, threads=1, max_rows=MAX_ROWS).step
    for start in range(0, len(ids), MAX_ROWS):
        end = min(start + MAX_ROWS, len(ids))
        step.run(
            ids[start:end],
            np.arange(start, end),
            np.arange(start, end),
            [(end - start, end, table)],
            np.arange(1),
        )
    blocks = pool.reshape(layout.num_layers, len(table), 2, BLOCK_SIZE, layout.row_nbytes)
    rows = blocks.transpose(0, 2, 1, 3, 4).reshape(layout.num_layers, 2, -1, layout.row_nbytes)
    return layout.geometry, np.ascontiguousarray(rows[:, :, : len(ids)])


def timed(work: Callable[[], object]) -> float:
    began = time.thread_time()
    work()
    return time.thread_time() - began


def measure(geometry: Geometry, kv: Rows, rounds: int) -> list[dict[str, object]]:
    sides = {profile.name: Side(profile.name) for profile in PROFILES}
    chance = np.random.default_rng(1).random((geometry.num_layers, geometry.num_kv_heads)).astype(np.float32)
    codecs = [Codec(each, geometry, head_scores=chance) for each in PROFILES]
    copied, squeezed = Side("copy", kv.nbytes), Side("zstd of the rows")
    made, out = np.zeros_like(kv), np.zeros((geometry.num_layers, kv[0].nbytes + 4096), np.uint8)
    zstd, unzstd = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()
    for _ in range(rounds):
        copied.encode_s.append(timed(lambda: np.copyto(made, kv)))
        copied.decode_s.append(timed(lambda: np.copyto(made, kv)))
        frames = []
        squeezed.encode_s.append(
            timed(lambda into=frames: into.extend(zstd.compress(each.data) for each in kv))
        )
        squeezed.decode_s.append(timed(lambda of=frames: [unzstd.decompress(frame) for frame in of]))
        squeezed.nbytes = sum(map(len, frames))
        for each in codecs:
            side, sizes = sides[each.profile.name], []

            def encode_all(each: Codec = each, sizes: list[int] = sizes) -> None:
                for layer, (keys, values) in enumerate(kv):
                    sizes.append(each.encode(layer, keys, values, out[layer]) or 0)

            def decode_all(sizes: list[int] = sizes) -> None:
                for layer, (keys, values) in enumerate(made):
                    decode(out[layer, : sizes[layer]], layer, geometry, keys, values)

            side.encode_s.append(timed(encode_all))
            side.decode_s.append(timed(decode_all))
            side.nbytes = sum(sizes)
            if not each.profile.is_lossy and not np.array_equal(made, kv):
                raise SystemExit(f"{each.profile.name} gave other bits back")
            if len(side.encode_s) == 1:
                side.off = (off(kv[:, 0], made[:, 0]), off(kv[:, 1], made[:, 1]))
    return [side.row(kv.nbytes) for side in (copied, squeezed, *sides.values())]


def off(before: Rows, after: Rows) -> float:
    one, other = (
        (np.ascontiguousarray(each).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        for each in (before, after)
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0] if __doc__ else "")
    parser.add_argument("--model", default="", help="Its directory; default: the demo model.")
    parser.add_argument("--text", type=Path, default=PAGE)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--numpy", action="store_true", help="As on a machine without a compiler.")
    parser.add_argument("--quick", action="store_true", help="48 tokens, one round.")
    parser.add_argument("--json", action="store_true", help="Print one line of JSON.")
    options = parser.parse_args()
    tokens, rounds = (48, 1) if options.quick else (options.tokens, options.rounds)
    model = options.model or str(fetch(default_cache(os.environ), lambda what, part: None))
    geometry, kv = kv_of(model, options.text.read_text(encoding="utf-8"), tokens)
    way = body if options.numpy else codec._way()
    with patch.object(codec, "_way", lambda: way):
        rows = measure(geometry, kv, rounds)
    told = {"num_tokens": kv.shape[2], "raw_nbytes": kv.nbytes, "native": way is not body, "rows": rows}
    if options.json:
        print(json.dumps(told))
        return
    print(
        f"{told['num_tokens']} tokens, {kv.nbytes / 1e6:.1f} MB of KV, {'C++' if told['native'] else 'numpy'}"
    )
    print(f"{'':<26}{'ratio':>7}{'encode':>9}{'decode':>9}{'K off':>8}{'V off':>8}")
    for row in rows:
        print(
            "{name:<26}{ratio:>7.2f}{encode_mb_s:>9}{decode_mb_s:>9}{off_keys:>8.3f}{off_values:>8.3f}".format(
                **row
            )
        )


if __name__ == "__main__":
    main()
