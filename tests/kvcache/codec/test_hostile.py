"""What comes from a link may be anything: a clear error, and nothing read, written or allocated beyond."""

from __future__ import annotations

import struct
import zlib

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from microserve.kvcache.codec.codec import Codec, CodecFailed, decode, header
from microserve.kvcache.codec.frame import HEADER_NBYTES
from microserve.kvcache.codec.profile import Levels, Profile
from microserve.kvcache.codec.steps import rans
from microserve.protocol.errors import TransferFailed
from tests.support.kvcache.codec import Bytes, geometry, profiles, random_rows, scores

pytestmark = pytest.mark.usefixtures("way")
OF = geometry()
TOKENS = 20


def payload_of(profile: Profile) -> Bytes:
    rows = random_rows(OF, TOKENS)
    out = np.empty(rows.nbytes + 4096, np.uint8)
    nbytes = Codec(profile, OF, head_scores=scores(OF)).encode(1, rows[0], rows[1], out)
    return out[:nbytes].copy()


PAYLOADS = [payload_of(profile) for profile in profiles()]


def tried(payload: Bytes, tokens: int = TOKENS, layer: int = 1) -> str:
    """What decoding says; empty: nothing. Around the rows all stays as it is."""
    width = OF.num_kv_heads * OF.head_dim * 2
    around = np.full((2, tokens + 2, width), 0x5A, np.uint8)
    try:
        decode(payload, layer, OF, around[0, 1:-1], around[1, 1:-1])
    except CodecFailed as error:
        assert isinstance(error, TransferFailed) and error.detail
        return error.detail
    finally:
        assert (around[:, 0] == 0x5A).all() and (around[:, -1] == 0x5A).all()
    return ""


def resealed(payload: Bytes) -> Bytes:
    """With a crc that fits: what is wrong then is for the decoder to find."""
    made = payload.copy()
    made[20:24] = np.frombuffer(struct.pack("<I", made.size), np.uint8)
    made[56:60] = np.frombuffer(struct.pack("<I", zlib.crc32(made[HEADER_NBYTES:].tobytes())), np.uint8)
    made[60:64] = np.frombuffer(struct.pack("<I", zlib.crc32(made[:60].tobytes())), np.uint8)
    return made


@given(st.sampled_from(PAYLOADS), st.data())
def test_a_bit_that_has_turned_is_seen(payload: Bytes, data: st.DataObject) -> None:
    made = payload.copy()
    made[data.draw(st.integers(0, made.size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tried(made)


@given(st.sampled_from(PAYLOADS), st.data())
def test_a_payload_that_was_cut_is_seen(payload: Bytes, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, payload.size - 1))
    assert tried(payload[:cut])
    torn = payload.copy()
    torn[cut:] = 0
    assert tried(torn) or (torn == payload).all()


@given(st.sampled_from(PAYLOADS), st.data())
@settings(max_examples=400)
def test_bytes_with_a_crc_that_fits_are_decoded_within_bounds(payload: Bytes, data: st.DataObject) -> None:
    """Sizes, tables, states, scales, masks and levels of the sender's choice."""
    made = payload.copy()
    for _ in range(data.draw(st.integers(1, 6))):
        made[data.draw(st.integers(4, made.size - 1))] = data.draw(st.integers(0, 255))
    change = data.draw(st.integers(-40, 40))
    made = made[:change] if change < 0 else np.concatenate((made, np.zeros(change, np.uint8)))
    if made.size >= HEADER_NBYTES:
        tried(resealed(made))


@given(st.binary(max_size=300))
def test_any_bytes_are_no_payload(content: bytes) -> None:
    assert tried(np.frombuffer(content, np.uint8))


LIES = [
    ("version", "B", 4, 2),
    ("transform", "B", 5, 9),
    ("quantiser", "B", 6, 9),
    ("coder", "B", 7, 9),
    ("dtype", "B", 8, 2),
    ("heads", "H", 10, 4),
    ("head_dim", "H", 12, 9),
    ("layer", "H", 14, 2),
    ("tokens", "I", 16, 21),
    ("more than", "I", 16, 0xFFFFFFFF),
    ("payload is of", "I", 20, 0xFFFFFFFF),
    ("too small", "I", 20, 3),
    ("keys.high", "H", 28, 1),
    ("bytes of a token's keys", "I", 36, 50),
    ("not known", "I", 44, 1),
]
"""What is said, where it stands in the header, its size, and a lie."""


@pytest.mark.parametrize(("what", "form", "at", "lie"), LIES)
def test_a_header_that_lies_is_told_what_it_said(what: str, form: str, at: int, lie: int) -> None:
    made = payload_of(Profile("it", quantiser="uniform", keys=Levels(12), values=Levels(10), coder="rans"))
    made[at : at + struct.calcsize(form)] = np.frombuffer(struct.pack(f"<{form}", lie), np.uint8)
    made[60:64] = np.frombuffer(struct.pack("<I", zlib.crc32(made[:60].tobytes())), np.uint8)
    assert what in tried(made)


def test_a_payload_of_something_else_is_told_apart() -> None:
    payload = PAYLOADS[-1]
    assert "layer" in tried(payload, layer=2)
    assert "tokens" in tried(payload, tokens=TOKENS - 1)
    with pytest.raises(CodecFailed, match="at least 64"):
        header(payload[:63])


def test_a_frame_that_says_it_is_huge_is_not_believed() -> None:
    """zstandard allocates what a frame says before it looks."""
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 24))
    body = np.frombuffer(len(bomb).to_bytes(4, "little") + bomb, np.uint8)
    payload = payload_of(Profile("it", coder="zstd"))
    assert "16777216" in tried(resealed(np.concatenate((payload[:HEADER_NBYTES], body))))
    endless = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(1 << 20))
    body = np.frombuffer(len(endless).to_bytes(4, "little") + endless, np.uint8)
    assert "frame" in tried(resealed(np.concatenate((payload[:HEADER_NBYTES], body))))


def test_scales_that_are_no_numbers_are_refused() -> None:
    payload = payload_of(Profile("it", quantiser="uniform", keys=Levels(12), values=Levels(10)))
    payload[HEADER_NBYTES : HEADER_NBYTES + 2] = np.frombuffer(b"\x00\x7c", np.uint8)
    assert "not all are numbers" in tried(resealed(payload))


def test_symbols_beyond_their_levels_are_refused() -> None:
    payload = payload_of(Profile("it", quantiser="uniform", keys=Levels(12), values=Levels(10), coder="pack"))
    payload[-1] = 0xFF
    assert "beyond" in tried(resealed(payload))


@given(
    levels=st.lists(st.integers(2, 256), min_size=1, max_size=4),
    count=st.integers(1, 100),
    seed=st.integers(0, 1 << 16),
    skew=st.sampled_from((0.2, 1.0, 8.0)),
)
def test_streams_of_any_symbols_come_back(levels: list[int], count: int, seed: int, skew: float) -> None:
    random = np.random.default_rng(seed)
    symbols = np.stack([(random.random(count) ** skew * each).astype(np.uint8) for each in levels])
    assert (rans.decode(rans.encode(symbols, levels), levels, count) == symbols).all()


def test_a_stream_is_hardly_longer_than_its_entropy() -> None:
    symbols = np.random.default_rng(3).binomial(15, 0.3, (1, 60_000)).astype(np.uint8)
    shares = np.bincount(symbols[0]) / symbols.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() / 8 * symbols.size
    assert rans.encode(symbols, [16]).size < 1.005 * entropy + 200


def test_frequencies_of_symbols_that_are_rare_are_at_least_one() -> None:
    symbols = np.concatenate((np.arange(256), np.zeros(100_000))).astype(np.uint8)
    table = rans.frequencies(symbols, 256)
    assert table.sum() == rans.TOTAL and (table >= 1).all()
    assert (rans.decode(rans.encode(symbols[None], [256]), [256], symbols.size) == symbols).all()
