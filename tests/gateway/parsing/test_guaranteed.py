"""Calls whose arguments are no JSON: what fits a schema can be written and is read back, and whatever the
grammar lets through is read as calls that fit."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema_rs import Draft202012Validator

from microserve.gateway.parsing.written.lark import Unwritable
from tests.support.parsing.schemas import arguments
from tests.support.parsing.written import WRITTEN, World, typed

MAX_STEPS = 300
FEW = settings(max_examples=8, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
Arguments = tuple[dict[str, Any], dict[str, Any]]


pytestmark = pytest.mark.slow


@pytest.mark.parametrize("style", WRITTEN)
@given(pair=arguments(), with_markers=st.booleans(), is_free=st.booleans())
@FEW
def test_what_fits_is_written_and_read_back(
    style: str, pair: Arguments, with_markers: bool, is_free: bool
) -> None:
    schema, value = pair
    family = style.split(maxsplit=1)[0]
    world = World(family, {"f": schema}, False, is_free, with_markers)
    text = WRITTEN[style]([("f", typed(value))])
    if world.may_write(value) and world.is_writable:
        assert world.admits(text), (text, world.lark)
        assert world.read(world.ids(text)) == ("", [("f", value)])


@pytest.mark.parametrize("family", sorted({style.split()[0] for style in WRITTEN}))
@given(pair=arguments(), other=arguments(), with_markers=st.booleans(), seed=st.integers(0, 99))
@FEW
def test_whatever_is_let_through_fits(
    family: str, pair: Arguments, other: Arguments, with_markers: bool, seed: int
) -> None:
    schemas = {"f": pair[0], "g": other[0]}
    world = World(family, schemas, False, False, with_markers)
    if not world.is_writable:
        return
    ids = walk(world, random.Random(seed))
    if ids is None:
        return
    text, calls = world.read(ids)
    assert calls and (not text or family == "gpt_oss"), (world.tokens.decode(ids), world.lark)
    for name, found in calls:
        assert Draft202012Validator(schemas[name]).is_valid(found)


def walk(world: World, chance: random.Random) -> list[int] | None:
    """Tokens at random, those that end something preferred; None where there is no end in sight."""
    matcher, ids = world.matcher(), list[int]()
    for _ in range(MAX_STEPS):
        if matcher.is_stopped() or (matcher.is_accepting() and chance.random() < 0.5):
            return ids
        mask = int.from_bytes(matcher.compute_bitmask(), "little")
        allowed = [at for at in range(world.tokens.get_vocab_size()) if mask >> at & 1]
        allowed = [each for each in allowed if each not in world.vocabulary.eos_tokens]
        if not allowed:
            return ids if matcher.is_accepting() else None
        ends = [each for each in allowed if each in world.ends]
        some = ends if ends and chance.random() < 0.5 else allowed
        ids.append(chance.choice(some))
        assert matcher.consume_token(ids[-1])
    return None


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "a kind without a value of it": ({"type": ["object", "boolean"], "enum": [True]}, ""),
    "nothing that fits": ({"type": "object", "enum": ["x"]}, ""),
    "one thing at most": ({"type": "array", "maxItems": 1, "items": {"type": "integer"}}, ""),
    "none at all": ({"type": "array", "maxItems": 0}, ""),
    "digits of ECMA": ({"type": "string", "pattern": r"^\d[\w-]*$"}, ""),
    "classes that are inverted": ({"type": "string", "pattern": r"^[\D]$"}, "pattern"),
    "a format that is not known here": ({"type": "string", "format": "ipv6"}, "format 'ipv6'"),
    "a reference elsewhere": ({"$ref": "#/properties/q"}, "$ref"),
    "two schemas at once": ({"allOf": [{"minLength": 1}, {"maxLength": 2}]}, "allOf"),
}


@pytest.mark.parametrize("family", ["glm", "deepseek_dsml", "kimi_xtml", "gemma"])
@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_compiles_or_is_refused_by_name(family: str, name: str) -> None:
    schema, says = ODD[name]
    world = World(family, {"f": {"properties": {"p": schema, "q": {"type": "integer"}}}})
    if says:
        with pytest.raises(Unwritable, match=re.escape(says)) as refused:
            assert world.lark
        assert refused.value.tool == "f"
        return
    style = next(each for each in WRITTEN if each.split()[0] == family)
    assert world.admits(WRITTEN[style]([("f", {"q": 1})]))
    if name == "digits of ECMA":
        assert world.admits(WRITTEN[style]([("f", {"p": "1a-"})]))
        assert not world.admits(WRITTEN[style]([("f", {"p": "\u0663"})]))
