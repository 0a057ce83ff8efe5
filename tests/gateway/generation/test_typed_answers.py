"""Tools, and an answer of a type, in one request: either comes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest
from tokenizers import Tokenizer

from tests.gateway.generation.test_tools import USER, WEATHER, both, calls_of, client_of
from tests.support.gateway.gateway_world import gateway_world, run
from tests.support.gateway.talking_model import TOOLS, make_talking_model, saying, talking_tokenizer


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


def test_with_tools_an_answer_is_the_json_that_is_asked_for_or_a_call(
    talker: Path, tokens: Tokenizer
) -> None:
    """As agents ask for it whose answers have a type."""
    schema = {"type": "object", "properties": {"m": {"type": "string", "format": "colour"}}}
    wish: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            asked: dict[str, Any] = {"tools": TOOLS, "response_format": wish}
            world.router.answer = saying(tokens, '{"m": "<tool_call>"}')
            answer = (await both(client, **asked)).choices[0]
            assert (answer.message.content, answer.finish_reason) == ('{"m": "<tool_call>"}', "stop")
            world.router.answer = saying(tokens, WEATHER)
            answer = (await both(client, **asked)).choices[0]
            assert [name for name, _ in calls_of(answer)] == ["weather"]
            one, *others = (each.message.sampling.grammar for each in world.router.served.values())
            assert one is not None and one.kind == "lark" and '"m"' in one.text and others == [one] * 3
            asked["tool_choice"] = "required"
            raw = await client.chat.completions.with_raw_response.create(model="tiny", messages=USER, **asked)
            assert "format 'colour' at #/properties/m" in raw.headers["x-microserve-warning"]
            assert [name for name, _ in calls_of(raw.parse().choices[0])] == ["weather"]
            *_, last = world.router.served.values()
            assert last.message.sampling.grammar is not None
            assert '"m"' not in last.message.sampling.grammar.text
            wish["json_schema"]["schema"] = {"not": {}}
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(model="tiny", messages=USER, **asked)
            assert str(caught.value.param).startswith("response_format")

    run(main())


def test_calls_that_are_json_are_not_mixed_with_answers_that_are(tmp_path: Path) -> None:
    async def main() -> None:
        settings = ("model.tool_parser=llama",)
        async with (
            gateway_world(make_talking_model(tmp_path), *settings) as world,
            client_of(world) as client,
        ):
            asked: Any = {"tools": TOOLS, "response_format": {"type": "json_object"}}
            with pytest.raises(openai.BadRequestError, match=r"tools of this model .llama.") as caught:
                await client.chat.completions.create(model="tiny", messages=USER, **asked)
            assert caught.value.param == "response_format"

    run(main())
