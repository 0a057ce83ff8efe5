"""WIRE.md says what the code does: every message, tag, field, type and default, every constant it names."""

from __future__ import annotations

import json
import re
import types
import typing
from pathlib import Path
from typing import Any, get_args, get_origin

import msgspec
import pytest

from microserve.protocol import errors
from microserve.protocol import types as protocol_types
from microserve.protocol.bus import codec, credit, numbered, peers, queue
from microserve.protocol.bus import sockets as sockets_module
from microserve.protocol.messages import adapter, check, engine_info, host, numerics
from microserve.protocol.messages import engine as actions
from microserve.protocol.messages import index as membership
from microserve.protocol.messages import router as serving
from microserve.protocol.messages import world as worlds
from microserve.protocol.messages.kv import coding, geometry, grant, kv_events
from microserve.protocol.messages.request import prompt_logprobs, sampling
from microserve.protocol.messages.strategy import control, decisions, scores
from microserve.protocol.settings.settings import BusSettings

PROTOCOL = Path(codec.__file__).parents[1]
SPEC = (PROTOCOL / "WIRE.md").read_text(encoding="utf-8")

CHANNELS = {
    "4.1": actions.EngineRequest,
    "4.2": actions.EngineReply,
    "5.1": serving.RouterRequest,
    "5.2": serving.RouterReply,
    "6.1": membership.IndexRequest,
    "6.2": membership.IndexReply,
    "7.2": kv_events.KVEvent,
}
"""Section -> the union of its messages."""
STRUCTURES = [
    grant.Grant,
    adapter.Adapter,
    coding.Decoding,
    coding.Coding,
    grant.HeapAddress,
    sampling.SamplingParams,
    sampling.Grammar,
    numerics.Numerics,
    geometry.Geometry,
    engine_info.EngineInfo,
    actions.EngineLoad,
    actions.LinkGoodput,
    host.HostFacts,
    actions.TokenLogprob,
    actions.Timings,
    actions.Usage,
    actions.Finished,
    actions.Delta,
    prompt_logprobs.PromptLogprobs,
    serving.Phases,
    serving.Ended,
    serving.Served,
    serving.Output,
    membership.Member,
    membership.MissingEngine,
    check.PairCheck,
    check.Suspect,
    control.StrategyVersion,
    control.ControlEntry,
    control.EngineLabels,
    control.VersionFault,
    control.StrategyServed,
    control.RouterControl,
    control.ShadowScore,
    control.ControlRecord,
    scores.Times,
    scores.Side,
    scores.Score,
    scores.Trial,
    scores.Ramp,
    scores.RampState,
    worlds.WorldRank,
    decisions.Explanation,
    decisions.Attempt,
    decisions.EngineSeen,
    decisions.Pick,
    decisions.Scored,
    decisions.Note,
    decisions.SendSeen,
    kv_events.WireBatch,
]
MESSAGES = [(section, t) for section, union in CHANNELS.items() for t in get_args(union)]


def section_of(number: str) -> str:
    """The text under the heading with that number, up to the next of its rank or above."""
    marks = "#" * (2 + number.count("."))
    found = re.search(rf"^{marks} {re.escape(number)}\.? .*?(?=^#{{1,{len(marks)}}} |\Z)", SPEC, re.M | re.S)
    assert found, f"WIRE.md has no section {number}"
    return found[0]


def block_of(name: str, within: str = SPEC) -> str:
    """The text under ``#### name``."""
    found = re.search(rf"^#### `{name}`.*?(?=^#|\Z)", within, re.M | re.S)
    assert found, f"WIRE.md does not describe {name} where it should"
    return found[0]


def rows_of(block: str) -> list[tuple[str, str, str]]:
    """Field, type and default of each row of the field table; a meaning is required."""
    _, _, table = block.partition("| field | type | default | meaning |\n|---|---|---|---|\n")
    rows = []
    for line in table.partition("\n\n")[0].splitlines():
        field, type_, default, meaning = (cell.strip() for cell in line.strip("|").split("|"))
        assert meaning, line
        rows.append((field.strip("`"), type_, default.strip("`")))
    return rows


def wire_type(hint: Any) -> str:
    if hint is None or hint is type(None):
        return "nil"
    if hint is Any:
        return "any"
    origin, args = get_origin(hint), get_args(hint)
    if origin is typing.Annotated:
        return wire_type(args[0])
    if origin in (typing.Union, types.UnionType):
        return " or ".join(sorted(dict.fromkeys(map(wire_type, args)), key=lambda name: name == "nil"))
    if origin is list or (origin is tuple and args[1:] == (Ellipsis,)):
        item = wire_type(args[0])
        return f"array of ({item})" if " or " in item else f"array of {item}"
    if origin is tuple:
        return f"pair of {' and '.join(map(wire_type, args))}"
    if origin is dict:
        value = wire_type(args[1])
        return f"map of {wire_type(args[0])} to {f'({value})' if ' or ' in value else value}"
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        return f"`{hint.__name__}`"
    return str(hint.__name__)


def wire_default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "required"
    value = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(value, msgspec.Struct):
        return msgspec.json.encode(value).decode()
    spelled = {None: "nil", False: "false", True: "true", "": '""', b"": '""', (): "[]"}
    return spelled[value] if isinstance(value, bool | str | bytes | tuple | None) else str(value)


def declared(struct: type[msgspec.Struct]) -> list[tuple[str, str, str]]:
    hints = typing.get_type_hints(struct, include_extras=True)
    return [
        (field.encode_name, wire_type(hints[field.name]), wire_default(field))
        for field in msgspec.structs.fields(struct)
    ]


@pytest.mark.parametrize(("section", "message"), MESSAGES, ids=[t.__name__ for _, t in MESSAGES])
def test_message_is_described_exactly(section: str, message: type[msgspec.Struct]) -> None:
    block = block_of(message.__name__, section_of(section))
    tag = message.__struct_config__.tag

    assert f"#### `{message.__name__}` {tag}\n" in block or f'#### `{message.__name__}` "{tag}"\n' in block
    assert rows_of(block) == declared(message)


@pytest.mark.parametrize("structure", STRUCTURES, ids=lambda t: str(t.__name__))
def test_structure_is_described_exactly(structure: type[msgspec.Struct]) -> None:
    block = block_of(structure.__name__)
    form = "array" if structure.__struct_config__.array_like else "map"

    assert f"#### `{structure.__name__}` {form}\n" in block
    assert rows_of(block) == declared(structure)


def test_nothing_is_described_that_does_not_exist() -> None:
    described = re.findall(r"^#### `(\w+)`", SPEC, re.M)

    assert sorted(described) == sorted(t.__name__ for t in [*(t for _, t in MESSAGES), *STRUCTURES])


def test_every_message_says_who_sends_it_and_what_answers() -> None:
    for section, message in MESSAGES:
        if section != "7.2":
            text = block_of(message.__name__, section_of(section))
            assert re.search(r"^(Router|Engine|Gateway|Index|Service|Watcher) → \w+\.", text, re.M), text


def test_every_error_code_is_listed() -> None:
    listed = re.findall(r"^\| `([a-z_]+)` \|", section_of("3.3"), re.M)
    declared_codes = {
        cls.code for cls in vars(errors).values() if isinstance(cls, type) and hasattr(cls, "code")
    }

    assert sorted(listed) == sorted(declared_codes)


def test_every_ability_is_listed() -> None:
    listed = re.findall(r"^\| `([a-z_]+)` \|", section_of("4.6"), re.M)

    assert listed == [*engine_info.ABILITIES]


def test_channels_are_numbered_as_in_the_code() -> None:
    rows = re.findall(r"^\| (\d) \| `([A-Z_]+)` \|", section_of("2.3"), re.M)

    assert [(int(number), name) for number, name in rows] == [(c.value, c.name) for c in codec.Channel]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WIRE_VERSION", protocol_types.WIRE_VERSION),
        ("MAX_REQUEST_ID_CHARS", protocol_types.MAX_REQUEST_ID_CHARS),
        ("MAX_MESSAGE_NBYTES", codec.MAX_MESSAGE_NBYTES),
        ("MAX_BULK_NBYTES", protocol_types.MAX_BULK_NBYTES),
        ("MAX_REQUEST_FRAME_NBYTES", protocol_types.MAX_REQUEST_FRAME_NBYTES),
        ("MAX_BULK_FRAMES", codec.MAX_BULK_FRAMES),
        ("MAX_CREDIT", credit.MAX_CREDIT),
        ("MAX_STREAM_PROMPT_NBYTES", queue.MAX_STREAM_PROMPT_NBYTES),
        ("MAX_FRAMES_PER_TURN", sockets_module.MAX_FRAMES_PER_TURN),
        ("MAX_NUMBERED_PEERS", numbered.MAX_NUMBERED_PEERS),
        ("MAX_NEXT_S", peers.MAX_NEXT_S),
        ("MAX_LANES", grant.MAX_LANES),
        ("MAX_ADAPTERS", adapter.MAX_ADAPTERS),
        ("MAX_SEQ", kv_events.MAX_SEQ),
        ("MAX_SOURCE_NBYTES", control.MAX_SOURCE_NBYTES),
        ("MAX_CONTROL_NBYTES", control.MAX_CONTROL_NBYTES),
        ("MAX_CONTROL_ENTRIES", control.MAX_CONTROL_ENTRIES),
        ("MAX_LABELLED_ENGINES", control.MAX_LABELLED_ENGINES),
        ("MAX_LABELS", control.MAX_LABELS),
        ("MAX_LABEL_CHARS", control.MAX_LABEL_CHARS),
        ("MAX_EXPLAINED_NBYTES", decisions.MAX_EXPLAINED_NBYTES),
        ("MAX_ATTEMPTS", decisions.MAX_ATTEMPTS),
        ("MAX_PICKS", decisions.MAX_PICKS),
        ("MAX_NOTES", decisions.MAX_NOTES),
        ("MAX_NOTE_CHARS", decisions.MAX_NOTE_CHARS),
        ("MAX_NOTE_VALUES", decisions.MAX_NOTE_VALUES),
        ("MAX_SCORES", decisions.MAX_SCORES),
        ("MAX_TOLD", check.MAX_TOLD),
        ("MAX_REPORTED", check.MAX_REPORTED),
        ("NUM_SUMS", scores.NUM_SUMS),
        ("FIRST_BUCKET_S", scores.FIRST_BUCKET_S),
        ("BUCKETS_PER_DOUBLING", scores.BUCKETS_PER_DOUBLING),
        ("NUM_BUCKETS", scores.NUM_BUCKETS),
        ("MAX_RAMP_SHARES", scores.MAX_RAMP_SHARES),
        ("MAX_RAMP_S", scores.MAX_RAMP_S),
        ("MAX_RAMP_REQUESTS", scores.MAX_RAMP_REQUESTS),
        ("MAX_WORLDS", worlds.MAX_WORLDS),
        ("MAX_WORLD_RANKS", worlds.MAX_WORLD_RANKS),
        ("MAX_WORLD_CHARS", worlds.MAX_WORLD_CHARS),
        ("MAX_UNIQUE_ID_NBYTES", worlds.MAX_UNIQUE_ID_NBYTES),
        ("MAX_LOGPROBS", sampling.MAX_LOGPROBS),
        ("MAX_STOP_TOKEN_IDS", sampling.MAX_STOP_TOKEN_IDS),
        ("MAX_GRAMMAR_NBYTES", sampling.MAX_GRAMMAR_NBYTES),
        ("MAX_AFTER_TOKEN_IDS", sampling.MAX_AFTER_TOKEN_IDS),
        ("MAX_LOGIT_BIAS", sampling.MAX_LOGIT_BIAS),
        ("MAX_NUMERICS_CHARS", numerics.MAX_NUMERICS_CHARS),
        ("MAX_ROPE_CHARS", geometry.MAX_ROPE_CHARS),
        ("MAX_CODEC_CHARS", coding.MAX_CODEC_CHARS),
        ("MAX_CODECS", coding.MAX_CODECS),
        ("bus.heartbeat_interval_s", BusSettings().heartbeat_interval_s),
        ("bus.liveness", BusSettings().liveness),
        ("bus.stuck_s", BusSettings().stuck_s),
        ("bus.high_water_mark", BusSettings().high_water_mark),
        ("bus.credit", BusSettings().credit),
        ("bus.linger_s", BusSettings().linger_s),
    ],
)
def test_constants_have_the_values_that_are_stated(name: str, value: float) -> None:
    stated = re.findall(rf"^\| `{re.escape(name)}` \| ([\d,.]+)", SPEC, re.M)

    assert [json.loads(number.replace(",", "")) for number in stated] == [value]


def test_sections_that_the_code_refers_to_exist() -> None:
    for folder in ("protocol", "services", "kvcache", "gateway"):
        for file in (PROTOCOL.parent / folder).rglob("*.py"):
            for numbers in re.findall(r"WIRE\.md ([\d.]+(?:, [\d.]+)*)", file.read_text(encoding="utf-8")):
                for number in numbers.split(", "):
                    assert section_of(number.rstrip(".")), f"{file}: WIRE.md {number}"
