"""KV through a codec and back, and what that takes: bytes and seconds. Knows no model.

A payload is one layer of a chunk of tokens, as engines send it; one that does not fit into what it is of, or
that its levels cannot hold, goes as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from microserve.kvcache.codec.codec import Codec, decode
from microserve.kvcache.codec.library import Cost
from microserve.kvcache.codec.profile import Profile
from microserve.protocol.messages.kv.geometry import Geometry

Bytes = npt.NDArray[np.uint8]
Scores = npt.NDArray[np.float32]
CLOCK = time.perf_counter


@dataclass(frozen=True, slots=True)
class Payloads:
    """KV as it is sent: geometry, scores of heads, and the tokens of a chunk."""

    geometry: Geometry
    head_scores: Scores
    chunk_tokens: int

    def codec(self, profile: Profile) -> Codec:
        scores = self.head_scores if profile.quantiser == "mixed_head" else None
        return Codec(profile, self.geometry, head_scores=scores)

    def chunks(self, rows: Bytes) -> Iterator[tuple[int, slice]]:
        """Layers and ranges of tokens of ``rows`` [layers, 2, tokens, row_nbytes]."""
        for layer in range(rows.shape[0]):
            for begin in range(0, rows.shape[2], self.chunk_tokens):
                yield layer, slice(begin, begin + self.chunk_tokens)

    def there_and_back(self, profile: Profile, rows: Bytes) -> tuple[Bytes, int]:
        """What the receiver has of ``rows``, and the bytes that went."""
        codec, received, sent = self.codec(profile), np.empty_like(rows), 0
        out = np.empty(rows[0].nbytes, np.uint8)
        for layer, span in self.chunks(rows):
            keys, values = rows[layer, 0, span], rows[layer, 1, span]
            nbytes = codec.encode(layer, keys, values, out[: keys.nbytes + values.nbytes])
            if nbytes is None:
                received[layer, :, span] = rows[layer, :, span]
                sent += keys.nbytes + values.nbytes
                continue
            sent += nbytes
            decode(out[:nbytes], layer, self.geometry, received[layer, 0, span], received[layer, 1, span])
        return received, sent

    def ratio(self, profile: Profile, every: Sequence[Bytes], every_layer: int = 1) -> float:
        """Raw bytes / bytes of payloads, of every ``every_layer``-th layer of them all."""
        codec, raw, sent = self.codec(profile), 0, 0
        for rows in every:
            out = np.empty(rows[0].nbytes, np.uint8)
            for layer, span in self.chunks(rows):
                if layer % every_layer == 0:
                    keys, values = rows[layer, 0, span], rows[layer, 1, span]
                    nbytes = keys.nbytes + values.nbytes
                    raw += nbytes
                    sent += codec.encode(layer, keys, values, out[:nbytes]) or nbytes
        return raw / sent

    def costs(
        self, profile: Profile, rows: Bytes, sizes: Sequence[int], repeats: int, clock: Callable[[], float]
    ) -> tuple[Cost, Cost]:
        """Of encoding and decoding one payload, from payloads of so many tokens, on this thread. The least of
        ``repeats`` runs counts: what else a machine does only adds to it.

        rows: [layers, 2, tokens, row_nbytes] of at least as many tokens as the largest size."""
        codec = self.codec(profile)
        raw, encode_s, decode_s = list[float](), list[float](), list[float]()
        out = np.empty(2 * rows[0].nbytes + 4096, np.uint8)
        for size in sizes:
            back = np.empty((2, size, rows.shape[3]), np.uint8)
            least = [float("inf"), float("inf")]
            for turn in range(repeats):
                layer = turn % rows.shape[0]
                began_s = clock()
                nbytes = codec.encode(layer, rows[layer, 0, :size], rows[layer, 1, :size], out)
                encoded_s = clock()
                if nbytes is not None:
                    decode(out[:nbytes], layer, self.geometry, back[0], back[1])
                least = [min(least[0], encoded_s - began_s), min(least[1], clock() - encoded_s)]
            raw.append(float(back.nbytes))
            encode_s.append(least[0])
            decode_s.append(least[1])
        return line(raw, encode_s), line(raw, decode_s)


def line(nbytes: Sequence[float], seconds: Sequence[float]) -> Cost:
    """``a_s + s_per_byte * bytes`` by least relative squares; neither is below 0."""
    x, y = np.asarray(nbytes), np.asarray(seconds)
    weights = 1 / np.maximum(y, 1e-9)
    table = np.stack([weights, x * weights], axis=1)
    found = np.linalg.lstsq(table, np.ones(len(y)), rcond=None)[0] if len(y) > 1 else np.array([-1.0, 0.0])
    a_s, s_per_byte = float(found[0]), float(found[1])
    if a_s < 0:
        a_s, s_per_byte = 0.0, float((weights * x * weights * y).sum() / ((x * weights) ** 2).sum())
    elif s_per_byte < 0:
        a_s, s_per_byte = float((weights * weights * y).sum() / (weights**2).sum()), 0.0
    return Cost(a_s, s_per_byte)
