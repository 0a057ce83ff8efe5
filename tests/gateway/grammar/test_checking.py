"""What cannot be enforced is refused with keyword and path; what is relaxed is told; verdicts are kept."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from microserve.gateway.grammar.asked import Asked
from microserve.gateway.grammar.checker import MAX_ASKED, MAX_KEPT, GrammarChecker
from microserve.gateway.grammar.checking import checked
from microserve.protocol.errors import InvalidRequest, QueueFull
from microserve.protocol.grammar.compiled import load_tokenizer
from microserve.protocol.messages.request.sampling import Grammar
from tests.support.gateway.gateway_world import make_tokenizer

OVERLAPPING = {"oneOf": [{"type": "string"}, {"type": "string", "minLength": 2}]}
UNKNOWN = {"type": "string", "format": "colour"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    make_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def check(model: Path, schema: Any, *, is_strict: bool = False) -> tuple[Any, list[str]]:
    grammar = Grammar(kind="json_schema", text=json.dumps(schema))
    result, warnings = checked(load_tokenizer(model), grammar, is_strict=is_strict)
    return json.loads(result.text), warnings


@pytest.mark.parametrize(
    ("schema", "sent", "warning"),
    [
        ({"oneOf": [{"type": "string"}, {"type": "integer"}]}, None, None),
        (
            {"properties": {"a": OVERLAPPING}},
            {"properties": {"a": {"anyOf": OVERLAPPING["oneOf"]}}},
            "oneOf at #/properties/a is enforced as anyOf",
        ),
        (
            {"properties": {"a/b": UNKNOWN}},
            {"properties": {"a/b": {"type": "string"}}},
            "format 'colour' at #/properties/a~1b is not enforced",
        ),
    ],
)
def test_what_is_relaxed_is_told(model: Path, schema: Any, sent: Any, warning: str | None) -> None:
    assert check(model, schema) == (sent or schema, [warning] if warning else [])


@pytest.mark.parametrize("schema", [OVERLAPPING, UNKNOWN])
def test_strict_relaxes_nothing(model: Path, schema: Any) -> None:
    with pytest.raises(InvalidRequest, match="at #"):
        check(model, schema, is_strict=True)


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (
            {"properties": {"a": {"type": "array", "uniqueItems": True}}},
            "uniqueItems at #/properties/a cannot",
        ),
        ({"items": {"if": {}, "then": {}}}, "if, then at #/items cannot"),
        ({"properties": {"not": {"not": {}}}}, "not at #/properties/not cannot"),
        ({"properties": {"a": {"type": "objec"}}}, "type at #/properties/a: "),
        ({"enum": []}, "Unsatisfiable"),
    ],
)
def test_a_refusal_names_keyword_and_path(model: Path, schema: Any, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        check(model, schema)


def test_gbnf_becomes_lark_and_lark_stays(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    gbnf, _ = checked(tokenizer, Grammar(kind="lark", text='root ::= "a" | "b"'), is_strict=False)
    assert "start:" in gbnf.text
    lark = Grammar(kind="lark", text='start: "a"')
    assert checked(tokenizer, lark, is_strict=False)[0].text.strip() == lark.text
    with pytest.raises(InvalidRequest):
        checked(
            tokenizer,
            Grammar(kind="lark", text="root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
            is_strict=False,
        )


def test_a_verdict_is_asked_for_once_whatever_it_is() -> None:
    asked: list[str] = []

    async def ask(grammar: Grammar, is_strict: bool, is_wanted: object) -> tuple[str, list[str]]:
        asked.append(grammar.text)
        if grammar.text == "bad":
            raise InvalidRequest("it is none", field="grammar")
        return grammar.text, ["w"]

    async def main() -> None:
        checker = GrammarChecker(ask)
        for _ in range(3):
            good = await checker.check(Asked(Grammar(kind="regex", text="a"), "guided_regex"))
            assert good is not None and (good.grammar.text, good.warnings) == ("a", ("w",))
            with pytest.raises(InvalidRequest, match="guided_regex: it is none") as refused:
                await checker.check(Asked(Grammar(kind="regex", text="bad"), "guided_regex"))
            assert refused.value.field == "guided_regex"
        assert asked == ["a", "bad"]
        with pytest.raises(InvalidRequest, match="4096"):
            await checker.check(Asked(Grammar(kind="regex", text="a" * 5000), "guided_regex"))
        assert asked == ["a", "bad"], "out of bounds: nobody is asked"
        for number in range(MAX_KEPT):
            await checker.check(Asked(Grammar(kind="regex", text=f"x{number}"), "guided_regex"))
        await checker.check(Asked(Grammar(kind="regex", text="a"), "guided_regex"))
        assert asked[-1] == "a"

    asyncio.run(main())


def test_what_many_ask_at_once_is_asked_once_and_not_for_who_has_gone() -> None:
    asked: list[str] = []
    let_go = asyncio.Event()

    async def ask(
        grammar: Grammar, is_strict: bool, is_wanted: Callable[[], bool] | None
    ) -> tuple[str, list[str]] | None:
        await let_go.wait()
        if is_wanted is not None and not is_wanted():
            return None
        asked.append(grammar.text)
        raise InvalidRequest("it is none", field="grammar")

    async def main() -> None:
        checker = GrammarChecker(ask)
        wish = Asked(Grammar(kind="regex", text="bomb"), "guided_regex")
        gone = asyncio.create_task(checker.check(wish, lambda: False))
        waiting = [asyncio.create_task(checker.check(wish, lambda: True)) for _ in range(50)]
        await asyncio.sleep(0)
        others = [
            asyncio.create_task(checker.check(Asked(Grammar(kind="regex", text=f"x{at}"), "guided_regex")))
            for at in range(MAX_ASKED)
        ]
        await asyncio.sleep(0)
        let_go.set()
        assert await gone is None
        refused = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(each, InvalidRequest) for each in refused)
        assert asked.count("bomb") == 1
        kinds = [type(each) for each in await asyncio.gather(*others, return_exceptions=True)]
        assert kinds == [InvalidRequest] * (MAX_ASKED - 1) + [QueueFull]
        with pytest.raises(InvalidRequest):
            await checker.check(Asked(Grammar(kind="regex", text="after"), "guided_regex"))

    asyncio.run(main())


def test_who_comes_when_the_first_has_gone_waits_for_the_second() -> None:
    asked: list[int] = []
    let_go = [asyncio.Event(), asyncio.Event()]

    async def ask(
        grammar: Grammar, is_strict: bool, is_wanted: Callable[[], bool] | None
    ) -> tuple[str, list[str]] | None:
        asked.append(len(asked))
        await let_go[min(asked[-1], 1)].wait()
        return None if asked[-1] == 0 else (grammar.text, [])

    async def main() -> None:
        checker = GrammarChecker(ask)
        wish = Asked(Grammar(kind="regex", text="a"), "guided_regex")
        first, second = (asyncio.create_task(checker.check(wish)) for _ in range(2))
        await asyncio.sleep(0)
        let_go[0].set()
        assert await first is None
        third = asyncio.create_task(checker.check(wish))
        await asyncio.sleep(0)
        let_go[1].set()
        assert await second == await third
        assert len(asked) == 2
        assert not checker._turns

    asyncio.run(main())
