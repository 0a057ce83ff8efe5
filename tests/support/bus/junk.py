"""Frames that no peer of ours would send: random, cut, bent and oversized ones, reproducible by seed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import msgspec


def _value(rng: random.Random, depth: int = 0) -> object:
    kinds = ["int", "negative", "huge", "float", "nan", "text", "bytes", "none", "bool", "list", "map"]
    match rng.choice(kinds if depth < 3 else kinds[:9]):
        case "int":
            return rng.choice(
                [0, 1, 2, 127, 128, 255, 65536, 2**31, 2**32 - 1, 2**63 - 1, rng.randrange(1000)]
            )
        case "negative":
            return -rng.choice([1, 2, 128, 2**31, 2**63])
        case "huge":
            return 2**64 - 1
        case "float":
            return rng.choice([0.0, -1.0, 1e308, rng.random()])
        case "nan":
            return rng.choice([float("nan"), float("inf"), float("-inf")])
        case "text":
            return rng.choice(["", "r", "x" * rng.randrange(300), "\u0000", "\U0001f600"])
        case "bytes":
            return rng.randbytes(rng.randrange(20))
        case "none":
            return None
        case "bool":
            return rng.random() < 0.5
        case "list":
            return [_value(rng, depth + 1) for _ in range(rng.randrange(6))]
        case _:
            return {f"k{i}": _value(rng, depth + 1) for i in range(rng.randrange(4))}


def _bend(rng: random.Random, message: bytes) -> bytes:
    data = bytearray(message)
    match rng.randrange(5):
        case 0:
            return bytes(data[: rng.randrange(len(data) + 1)])
        case 1:
            for _ in range(rng.randrange(1, 4)):
                if data:
                    data[rng.randrange(len(data))] = rng.randrange(256)
            return bytes(data)
        case 2:
            return bytes(data) + rng.randbytes(rng.randrange(1, 20))
        case 3:  # a length that promises more than there is
            return (
                rng.choice([b"\xdd\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xdf\x7f\xff\xff\xff"]) + data
            )
        case _:  # deep nesting
            return b"\x91" * rng.randrange(1, 3000) + bytes(data)


def junk(seed: int, header: bytes, samples: Sequence[bytes], count: int) -> Iterator[list[bytes]]:
    """``count`` multipart messages; ``samples`` are valid message frames of the socket, to be bent."""
    rng = random.Random(seed)
    num_tags = 16
    for _ in range(count):
        match rng.randrange(8):
            case 0:
                yield [rng.randbytes(rng.randrange(40)) for _ in range(rng.randrange(1, 7))]
            case 1:
                yield [header]
            case 2:
                yield [header, rng.randbytes(rng.randrange(60))]
            case 3:
                yield [rng.randbytes(rng.randrange(1, 4)), rng.choice(samples)]
            case 4 | 5:
                yield [header, _bend(rng, rng.choice(samples))]
            case 6:  # the right kind with wrong values
                fields = [rng.randrange(num_tags), *[_value(rng) for _ in range(rng.randrange(10))]]
                yield [header, msgspec.msgpack.encode(fields)]
            case _:  # a valid message with bulk that is not
                yield [
                    header,
                    rng.choice(samples),
                    *[rng.randbytes(rng.randrange(30)) for _ in range(rng.randrange(1, 4))],
                ]
