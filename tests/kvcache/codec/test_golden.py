"""Payloads of version 1 as they were first made: what a build of today takes, and makes again.

python -m tests.kvcache.codec.test_golden     writes golden.json; a new version has samples beside these
"""

from __future__ import annotations

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from microserve.kvcache.codec.codec import Codec, decode
from microserve.kvcache.codec.profile import Profile
from tests.support.kvcache.codec import Bytes, geometry, profiles, scores

FILE = Path(__file__).with_name("golden.json")
DTYPES = {"none": "float32", "pack": "bfloat16", "zstd": "float16", "rans": "bfloat16"}
"""Of the samples, by their coder."""
TOKENS, LAYER = 9, 2


def rows_of(dtype: str) -> Bytes:
    """By integers: numpy's random numbers may be others some day."""
    numbers = (np.arange(2 * TOKENS * 24, dtype=np.int64) * 7919 % 1009 - 504).reshape(2, TOKENS, 24)
    halves = (numbers / 128).astype(np.float32)
    if dtype == "bfloat16":
        return (halves.view(np.uint32) >> 16).astype("<u2").view(np.uint8)
    return halves.astype("<f2" if dtype == "float16" else "<f4").view(np.uint8)


def made_of(profile: Profile) -> Bytes:
    of = geometry(DTYPES[profile.coder])
    rows, out = rows_of(of.dtype), np.zeros(4096, np.uint8)
    nbytes = Codec(profile, of, head_scores=scores(of)).encode(LAYER, rows[0], rows[1], out)
    assert nbytes is not None
    return out[:nbytes]


def restored(payload: Bytes, dtype: str) -> Bytes:
    rows = np.zeros_like(rows_of(dtype))
    decode(payload, LAYER, geometry(dtype), rows[0], rows[1])
    return rows


@pytest.mark.parametrize("profile", profiles(), ids=lambda each: each.name)
@pytest.mark.usefixtures("way")
def test_a_payload_of_version_1_is_what_it_was(profile: Profile) -> None:
    sample = json.loads(FILE.read_text())[profile.name]
    payload = np.frombuffer(base64.b64decode(sample["payload"]), np.uint8)
    assert base64.b64encode(restored(payload, DTYPES[profile.coder]).tobytes()).decode() == sample["rows"]
    if profile.coder != "zstd":  # another zstd may make another frame of the same
        assert made_of(profile).tobytes() == payload.tobytes()


if __name__ == "__main__":
    samples = {
        each.name: {
            "payload": base64.b64encode(made_of(each).tobytes()).decode(),
            "rows": base64.b64encode(restored(made_of(each), DTYPES[each.coder]).tobytes()).decode(),
        }
        for each in profiles()
    }
    FILE.write_text(json.dumps(samples, indent=1) + "\n")
