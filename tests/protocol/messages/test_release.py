"""What the release before said is read today, and what we say is read there: its golden bytes (WIRE.md 8)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from microserve.protocol.bus.codec import Codec
from microserve.protocol.types import WIRE_VERSION
from tests.support.bus.wire_samples import MESSAGES, name_of

GOLDEN: dict[str, str] = json.loads((Path(__file__).parents[2] / "data" / "wire_0.2.0.json").read_text())
"""Each message of 0.2.0 by ``CHANNEL.Message``, with a value of its own in each field."""
CODECS: dict[str, Codec[Any]] = {name_of(codec, message): codec for codec, message in MESSAGES}


def grown(old: Any, new: Any) -> bool:
    """Is ``new`` what ``old`` is, but for what was appended?"""
    if isinstance(old, list) and isinstance(new, list):
        return len(old) <= len(new) and all(map(grown, old, new))
    if isinstance(old, dict) and isinstance(new, dict):
        return all(key in new and grown(value, new[key]) for key, value in old.items())
    return type(old) is type(new) and old == new


@pytest.mark.parametrize("name", GOLDEN)
def test_each_message_is_read_and_has_only_grown(name: str) -> None:
    codec, said = CODECS[name], bytes.fromhex(GOLDEN[name])

    message, _ = codec.decode([bytes((WIRE_VERSION, codec.channel)), said])

    assert name_of(codec, message) == name
    ours = msgspec.msgpack.decode(codec.encode(message)[1], strict=False)
    assert grown(msgspec.msgpack.decode(said, strict=False), ours)


def test_that_look_can_fail() -> None:
    assert grown([1, "a", {"k": 1}], [1, "a", {"k": 1, "l": 2}, 3])
    for other in ([1, "a"], [1, "b", {"k": 1}], [1, "a", {"l": 2}], [True, "a", {"k": 1}]):
        assert not grown([1, "a", {"k": 1}], other)
