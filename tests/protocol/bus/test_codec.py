"""The bytes of every message, how they may change, and what happens to bytes that are none."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, get_args

import hypothesis.strategies as st
import msgspec
import pytest
from hypothesis import given, settings

from microserve.protocol.bus import codec as module
from microserve.protocol.bus.codec import (
    ENGINE_REPLY,
    ENGINE_REQUEST,
    INDEX_REPLY,
    INDEX_REQUEST,
    MAX_BULK_FRAMES,
    MAX_MESSAGE_NBYTES,
    ROUTER_REPLY,
    ROUTER_REQUEST,
    Channel,
    Codec,
    decode_tokens,
    encode_tokens,
)
from microserve.protocol.errors import InternalError, PromptTooLong, ProtocolViolation
from microserve.protocol.messages import engine as actions
from microserve.protocol.messages import index as membership
from microserve.protocol.messages import router as serving
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.protocol.types import MAX_PROMPT_TOKENS, WIRE_VERSION
from tests.support.bus.junk import junk
from tests.support.bus.wire_parts import GRANT, SAMPLING
from tests.support.bus.wire_samples import GOLDEN, MESSAGES, name_of
from tests.support.examples import examples

CHANNELS: list[tuple[Codec[Any], Any]] = [
    (ENGINE_REQUEST, actions.EngineRequest),
    (ENGINE_REPLY, actions.EngineReply),
    (ROUTER_REQUEST, serving.RouterRequest),
    (ROUTER_REPLY, serving.RouterReply),
    (INDEX_REQUEST, membership.IndexRequest),
    (INDEX_REPLY, membership.IndexReply),
]
NAMES = [name_of(codec, message) for codec, message in MESSAGES]


def structs_in(value: Any) -> Iterator[msgspec.Struct]:
    """A struct and every struct inside it."""
    if isinstance(value, msgspec.Struct):
        yield value
        for field in value.__struct_fields__:
            yield from structs_in(getattr(value, field))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from structs_in(item)


SAMPLES = {type(inner): inner for _, message in MESSAGES for inner in structs_in(message)}
"""One value of every struct that can be on the wire."""
ARRAYS = [pytest.param(s, id=t.__name__) for t, s in SAMPLES.items() if t.__struct_config__.array_like]
MAPS = [pytest.param(s, id=t.__name__) for t, s in SAMPLES.items() if not t.__struct_config__.array_like]


def fields_of(sample: msgspec.Struct) -> tuple[msgspec.structs.FieldInfo, ...]:
    return msgspec.structs.fields(sample)


def default_of(field: msgspec.structs.FieldInfo) -> Any:
    return field.default if field.default is not msgspec.NODEFAULT else field.default_factory()


# --- golden bytes ------------------------------------------------------------------------------------


def test_every_message_of_every_channel_has_golden_bytes() -> None:
    declared = {f"{codec.channel.name}.{t.__name__}" for codec, union in CHANNELS for t in get_args(union)}

    assert set(NAMES) == declared
    assert set(GOLDEN) == declared
    assert len(NAMES) == len(declared)
    assert {codec.channel for codec, _ in CHANNELS} == set(Channel)


@pytest.mark.parametrize(("codec", "message"), MESSAGES, ids=NAMES)
def test_golden_bytes(codec: Codec[Any], message: Any) -> None:
    golden = [bytes((WIRE_VERSION, codec.channel)), bytes.fromhex(GOLDEN[name_of(codec, message)])]

    assert codec.encode(message) == golden
    assert codec.decode(golden) == (message, [])
    assert codec.decode([memoryview(frame) for frame in golden]) == (message, [])


def test_golden_values_are_told_apart_from_defaults() -> None:
    """A field that is appended later must be given a value in the samples, or its bytes are untested."""
    unset = [
        f"{cls.__name__}.{field.name}"
        for cls, sample in SAMPLES.items()
        for field in fields_of(sample)
        if not field.required and getattr(sample, field.name) == default_of(field)
    ]

    assert unset == []


def test_tags_are_unique_small_and_positive() -> None:
    for _, union in CHANNELS:
        tags = [t.__struct_config__.tag for t in get_args(union)]
        assert sorted(tags) == list(range(1, len(tags) + 1))


def test_frames_by_hand() -> None:
    """Read beside WIRE.md 2, without any encoder of ours."""
    ping = b"\x92" + b"\x0b" + b"\xcf" + struct.pack(">Q", 1 << 40)

    assert ENGINE_REQUEST.decode([b"\x01\x01", ping]) == (actions.Ping(1 << 40), [])


def test_default_sampling_is_an_empty_map() -> None:
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(SamplingParams())) == {}


# --- evolution (WIRE.md 8) ---------------------------------------------------------------------------


@pytest.mark.parametrize("sample", ARRAYS)
def test_older_reader_takes_a_message_with_appended_fields(sample: msgspec.Struct) -> None:
    items = msgspec.msgpack.decode(msgspec.msgpack.encode(sample))
    for later in ([1], ["x", None], [{"a": [1]}, 2.5, b"b"]):
        newer = msgspec.msgpack.encode([*items, *later])

        assert msgspec.msgpack.decode(newer, type=type(sample)) == sample


@pytest.mark.parametrize("sample", ARRAYS)
def test_newer_reader_takes_a_message_without_the_fields_that_have_defaults(sample: msgspec.Struct) -> None:
    items = msgspec.msgpack.decode(msgspec.msgpack.encode(sample))
    expected = sample
    for field in reversed(fields_of(sample)):
        items.pop()
        older = msgspec.msgpack.encode(items)
        if field.required:
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(older, type=type(sample))
            return
        expected = msgspec.structs.replace(expected, **{field.name: default_of(field)})
        assert msgspec.msgpack.decode(older, type=type(sample)) == expected


@pytest.mark.parametrize("sample", ARRAYS)
def test_fields_with_defaults_come_last(sample: msgspec.Struct) -> None:
    required = [field.required for field in fields_of(sample)]

    assert required == sorted(required, reverse=True)


@pytest.mark.parametrize("sample", MAPS)
def test_map_takes_unknown_keys_and_misses_optional_ones(sample: msgspec.Struct) -> None:
    items = msgspec.msgpack.decode(msgspec.msgpack.encode(sample))

    assert msgspec.msgpack.decode(msgspec.msgpack.encode(items | {"later": [1]}), type=type(sample)) == sample
    for field in fields_of(sample):
        older = msgspec.msgpack.encode({k: v for k, v in items.items() if k != field.name})
        if field.required:
            with pytest.raises(msgspec.ValidationError):
                msgspec.msgpack.decode(older, type=type(sample))
        else:
            decoded = msgspec.msgpack.decode(older, type=type(sample))
            assert getattr(decoded, field.name) == default_of(field)


def test_evolution_reaches_every_nested_struct() -> None:
    names = {cls.__name__ for cls in SAMPLES}

    assert {
        "Grant",
        "HeapAddress",
        "SamplingParams",
        "EngineInfo",
        "EngineLoad",
        "Delta",
        "Finished",
    } <= names
    assert {"Usage", "Timings", "TokenLogprob", "Output", "Ended", "Phases", "Member"} <= names


def test_unknown_tag_is_a_violation() -> None:
    for codec, _ in CHANNELS:
        with pytest.raises(ProtocolViolation):
            codec.decode([bytes((WIRE_VERSION, codec.channel)), msgspec.msgpack.encode([99, 1])])


# --- frames that are none ------------------------------------------------------------------------------


def test_header_must_be_version_and_channel() -> None:
    _, message = ENGINE_REQUEST.encode(actions.Drain(1))
    wrong = {
        b"": "header of 0 bytes",
        b"\x01": "header of 1 bytes",
        b"\x01\x01\x00": "header of 3 bytes",
        b"\x02\x01": "wire version 2, expected 1",
        b"\x01\x02": r"channel 2, expected 1 \(ROUTER_TO_ENGINE\)",
        b"\x01\x63": "channel 99",
    }
    for header, reason in wrong.items():
        with pytest.raises(ProtocolViolation, match=reason):
            ENGINE_REQUEST.decode([header, message])


@pytest.mark.parametrize("count", [0, 1, 3 + MAX_BULK_FRAMES])
def test_number_of_frames_is_bounded(count: int) -> None:
    frames = [*ENGINE_REQUEST.encode(actions.Drain(1)), b"", b"", b"", b"", b""][:count]
    with pytest.raises(ProtocolViolation, match=f"{count} frames, expected 2 to 6"):
        ENGINE_REQUEST.decode(frames)


def test_long_message_is_refused_before_it_is_parsed() -> None:
    long = b"\xc1" * (MAX_MESSAGE_NBYTES + 1)
    with pytest.raises(ProtocolViolation, match=f"message of {len(long)} bytes, limit {MAX_MESSAGE_NBYTES}"):
        ENGINE_REQUEST.decode([b"\x01\x01", long])


def test_bulk_is_bounded_over_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BULK_NBYTES", 10)
    frames = [*ENGINE_REQUEST.encode(actions.Drain(1)), b"x" * 6, b"y" * 5]
    with pytest.raises(ProtocolViolation, match="bulk of 11 bytes, limit 10"):
        ENGINE_REQUEST.decode(frames)
    assert ENGINE_REQUEST.decode(frames[:3]) == (actions.Drain(1), [b"x" * 6])


def test_message_of_another_channel_is_a_violation_even_with_its_tag() -> None:
    _, welcome = ENGINE_REPLY.encode(actions.Granted(1, GRANT))
    with pytest.raises(ProtocolViolation):
        ENGINE_REQUEST.decode([b"\x01\x01", welcome])


@pytest.mark.parametrize(
    "bomb",
    [
        b"\x91" * 1_000_000,
        b"\x92\x01" + b"\x91" * 1_000_000,
        b"\x81\xa1a" * 500_000,
        b"\xdd\xff\xff\xff\xff",
        b"\x92\x01\xdb\xff\xff\xff\xff",
        b"\xc9\xff\xff\xff\xff\x01",
    ],
    ids=["nested", "nested field", "nested maps", "long array", "long text", "long extension"],
)
def test_bombs_cost_nothing(bomb: bytes) -> None:
    for codec, _ in CHANNELS:
        with pytest.raises(ProtocolViolation):
            codec.decode([bytes((WIRE_VERSION, codec.channel)), bomb])


@pytest.mark.parametrize(("codec", "_union"), CHANNELS, ids=[codec.channel.name for codec, _ in CHANNELS])
def test_junk_is_a_violation_and_nothing_else(codec: Codec[Any], _union: Any) -> None:
    """100,000 frames over the six channels."""
    header = bytes((WIRE_VERSION, codec.channel))
    samples = [codec.encode(message)[1] for its, message in MESSAGES if its is codec]
    violations = 0
    for frames in junk(int(codec.channel), header, samples, 100_000 // 6 + 1):
        try:
            message, _ = codec.decode(frames)
        except ProtocolViolation as violation:
            violations += 1
            assert violation.detail
        else:
            codec.decode(codec.encode(message))

    assert violations > 5_000


@given(st.sampled_from(MESSAGES), st.data())
@settings(max_examples=examples(500), deadline=None)
def test_any_bent_golden_is_a_message_or_a_violation(sample: tuple[Codec[Any], Any], data: Any) -> None:
    codec, message = sample
    header, body = codec.encode(message)
    bent = bytearray(body)
    for _ in range(data.draw(st.integers(1, 4))):
        bent[data.draw(st.integers(0, len(bent) - 1))] = data.draw(st.integers(0, 255))
    del bent[data.draw(st.integers(0, len(bent))) :]
    try:
        codec.decode([header, bytes(bent)])
    except ProtocolViolation as violation:
        assert codec.channel.name in violation.detail


def test_another_version_is_named_whatever_its_header() -> None:
    """A number behind it (WIRE.md 2.5), or what nobody has thought of yet, is not what is wrong."""
    codec, message = MESSAGES[0]
    header, body = codec.encode(message)
    for more in (b"", bytes(8), bytes(20)):
        with pytest.raises(
            ProtocolViolation, match=f"wire version {WIRE_VERSION + 1}, expected {WIRE_VERSION}"
        ):
            codec.decode([bytes((WIRE_VERSION + 1, header[1])) + more, body])
    with pytest.raises(ProtocolViolation, match="header of 0 bytes"):
        codec.decode([b"", body])


# --- tokens --------------------------------------------------------------------------------------------


def test_tokens_are_little_endian_u32() -> None:
    assert encode_tokens([1, 256, 2**32 - 1]) == b"\x01\x00\x00\x00\x00\x01\x00\x00\xff\xff\xff\xff"
    assert encode_tokens([]) == b""


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1)))
def test_tokens_round_trip(tokens: list[int]) -> None:
    data = encode_tokens(tokens)

    assert decode_tokens(data) == tokens
    assert decode_tokens(memoryview(data)) == tokens


@pytest.mark.parametrize("token", [-1, 2**32])
def test_token_outside_32_bits_is_refused(token: int) -> None:
    with pytest.raises(OverflowError):
        encode_tokens([token])


@pytest.mark.parametrize("nbytes", [1, 2, 3, 5])
def test_token_frame_of_odd_length_is_a_violation(nbytes: int) -> None:
    with pytest.raises(ProtocolViolation, match=f"token frame of {nbytes} bytes"):
        decode_tokens(bytes(nbytes))


def test_bulk_that_no_peer_would_take_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BULK_NBYTES", 10)
    for bulk in ([b"x" * 6, b"y" * 5], [b""] * (MAX_BULK_FRAMES + 1)):
        with pytest.raises(InternalError, match="bulk frames"):
            ENGINE_REQUEST.encode(actions.Drain(1), *bulk)


def test_bulk_travels_behind_the_message() -> None:
    message = actions.PrepRecv(1, "r", 4, 1.0)
    frames = ENGINE_REQUEST.encode(message, encode_tokens([5, 6]), b"more")

    assert ENGINE_REQUEST.decode(frames) == (message, [encode_tokens([5, 6]), b"more"])
    assert ROUTER_REQUEST.encode(serving.Generate("r", "m", SAMPLING, 1.0))[2:] == []
    assert {codec.channel for codec in (ROUTER_REPLY, INDEX_REQUEST, INDEX_REPLY)} == {4, 5, 6}


@pytest.mark.parametrize("codec", [module.ENGINE_REQUEST, module.ROUTER_REQUEST, module.INDEX_REQUEST])
def test_a_prompt_that_no_bound_socket_takes_is_refused_before_it_costs_the_connection(codec: Any) -> None:
    longest = bytes(4 * MAX_PROMPT_TOKENS)
    message = next(message for each, message in MESSAGES if each is codec)
    assert len(codec.encode(message, longest)) == 3
    with pytest.raises(
        PromptTooLong, match=f"at most {MAX_PROMPT_TOKENS} tokens, not {MAX_PROMPT_TOKENS + 1}"
    ):
        codec.encode(message, longest + bytes(4))
