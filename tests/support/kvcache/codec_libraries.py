"""Libraries of codecs with made-up costs, and the times that a transfer takes by them."""

from __future__ import annotations

import random

from microserve.kvcache.codec.library import Cost, Library, Measured, Quality
from microserve.kvcache.codec.profile import Levels, Profile

CODECS = frozenset({"kv1:none", "kv1:pack", "kv1:zstd", "kv1:rans"})


def lossy(
    name: str,
    ratio: float,
    encode_bytes_per_s: float,
    decode_bytes_per_s: float,
    *,
    a_s: float = 0.0,
    score: float = 1.0,
) -> Measured:
    """Uniform levels and rANS."""
    profile = Profile(name, quantiser="uniform", keys=Levels(8), values=Levels(8), coder="rans")
    encode, decode = Cost(a_s, 1.0 / encode_bytes_per_s), Cost(a_s, 1.0 / decode_bytes_per_s)
    return Measured(profile, ratio, encode, decode, Quality(score, score, score))


def lossless(name: str, ratio: float, bytes_per_s: float, *, a_s: float = 0.0) -> Measured:
    cost = Cost(a_s, 1.0 / bytes_per_s)
    return Measured(Profile(name, coder="zstd"), ratio, cost, cost)


def at_random(seed: int, *, most: int = 24) -> Library:
    """1 to ``most`` profiles of 20 MB/s to 20 GB/s and ratios of 0.9 to 20."""
    source = random.Random(seed)

    def entry(number: int) -> Measured:
        ratio = 10 ** source.uniform(-0.05, 1.3)
        encode, decode = (10 ** source.uniform(7.3, 10.3) for _ in range(2))
        a_s, score = source.choice((0.0, 10 ** source.uniform(-6, -3))), source.choice((0.9, 0.95, 0.99, 1.0))
        if source.random() < 0.3:
            return lossless(f"lossless-{number}", ratio, encode, a_s=a_s)
        return lossy(f"lossy-{number}", ratio, encode, decode, a_s=a_s, score=score)

    return Library(entries=[entry(number) for number in range(source.randint(1, most))])


def seconds(
    measured: Measured, nbytes: int, num_payloads: int, bytes_per_s: float, *, is_overlapped: bool = False
) -> float:
    """Of a transfer, by the definition: stages one after the other, or the slowest with the others once."""
    encode, decode = (cost.seconds(nbytes, num_payloads) for cost in (measured.encode, measured.decode))
    wire = nbytes / measured.ratio / bytes_per_s
    if not is_overlapped:
        return encode + wire + decode
    each = [stage / num_payloads for stage in (encode, wire, decode)]
    return sum(each) + (num_payloads - 1) * max(each)
