"""What is asked of the Messages API at a served gateway is what engines and templates are told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.support.gateway.anthropic_stream import events_of
from tests.support.gateway.gateway_world import Served, run
from tests.support.gateway.messages_world import (
    BODY,
    COUNT,
    MESSAGES,
    SCHEMA,
    TOOLS,
    USER,
    WEATHER,
    both,
    served,
)
from tests.support.gateway.talking_model import call, saying

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time


def test_what_was_cached_is_no_input_and_the_sum_is_what_is_counted(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):

            def answer(request: Served) -> None:
                request.send(tokens.encode("yes").ids)
                request.end("length", cached_tokens=4)

            world.router.answer = answer
            body = {**BODY, "system": "Be brief.", "thinking": {"type": "adaptive"}, "tools": TOOLS}
            message = await both(http, **body)
            counted = (await http.post(COUNT, json=body)).json()
            usage = message["usage"]
            assert (usage["cache_read_input_tokens"], usage["cache_creation_input_tokens"]) == (4, 0)
            assert counted == {"input_tokens": usage["input_tokens"] + 4}
            stream = await http.post(MESSAGES, json={**body, "stream": True})
            begun = events_of(stream.content)[0]["message"]["usage"]
            assert begun == {
                "input_tokens": counted["input_tokens"],
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 0,
                "output_tokens": 0,
            }

    run(main())


def test_a_body_that_is_read_elsewhere_is_the_same(talker: Path, tokens: Tokenizer) -> None:
    """Beyond 64 KiB it goes to a helper, with all that is said in it."""

    async def main() -> None:
        async with served(talker, max_model_len=1 << 17) as (world, http):
            world.router.answer = saying(tokens, f"hm</think>a; {WEATHER}")
            body = {
                **BODY,
                "system": [{"type": "text", "text": "word " * (1 << 14)}],
                "tools": TOOLS,
                "stop_sequences": ["b"],
                "thinking": {"type": "enabled", "budget_tokens": 1024, "display": "omitted"},
                "output_config": {"effort": "low"},
            }
            message = await both(http, **body)
            assert message["content"][0] == {"type": "thinking", "thinking": "", "signature": ""}
            assert [block["type"] for block in message["content"]] == ["thinking", "text", "tool_use"]
            reply = await http.post(MESSAGES, json=body)
            assert reply.headers["x-microserve-warning"] == "thinking.budget_tokens is not enforced"
            counted = await http.post(COUNT, json={key: body[key] for key in body if key != "max_tokens"})
            assert counted.json() == {"input_tokens": message["usage"]["input_tokens"]}
            *_, asked = world.router.served.values()
            assert tokens.decode(asked.tokens, skip_special_tokens=False).endswith("<think>\nlow")

    run(main())


def test_more_tokens_than_the_context_has_room_for(talker: Path, tokens: Tokenizer) -> None:
    """Agents ask for as many as the largest models give, whatever the model is: what there is, is given."""

    async def main() -> None:
        async with served(talker) as (world, http):
            world.router.answer = saying(tokens, "long", reason="length")
            message = await both(http, max_tokens=64_000)
            assert message["stop_reason"] == "model_context_window_exceeded"
            [asked, _] = world.router.served.values()
            assert asked.message.sampling.max_tokens == 512 - len(asked.tokens)
            reply = await http.post(MESSAGES, json={**BODY, "system": "word " * 600})
            error = reply.json()["error"]
            assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
            assert error["message"].startswith("prompt is too long: ")
            counted = await http.post(COUNT, json={**BODY, "system": "word " * 600})
            assert counted.json()["input_tokens"] > 512

    run(main())


def test_an_answer_goes_on_with_what_it_is_given(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):
            world.router.answer = saying(tokens, "B)")
            begun = {"role": "assistant", "content": [{"type": "text", "text": "The answer is ("}]}
            body = {**BODY, "messages": [*USER, begun]}
            message = await both(http, **body)
            assert message["content"] == [{"type": "text", "text": "B)"}]
            [asked, _] = world.router.served.values()
            prompt = tokens.decode(asked.tokens, skip_special_tokens=False)
            assert prompt.endswith("<|im_start|>assistant\nThe answer is (")
            assert (await http.post(COUNT, json=body)).json() == {"input_tokens": len(asked.tokens)}

    run(main())


def test_what_cannot_be_honoured_of_thinking_is_told(
    talker: Path, tokens: Tokenizer, model: Path, raw_tokenizer: Tokenizer
) -> None:
    thinking = {"type": "enabled", "budget_tokens": 2048}

    async def prompt_and_warning(directory: Path, words: Tokenizer, **fields: Any) -> tuple[str, str | None]:
        async with served(directory) as (world, http):
            world.router.answer = saying(words, "yes")
            reply = await http.post(MESSAGES, json={**BODY, **fields})
            assert reply.status_code == 200, reply.text
            [asked] = world.router.served.values()
            prompt = words.decode(asked.tokens, skip_special_tokens=False)
            return prompt.rpartition("assistant\n")[2], reply.headers.get("x-microserve-warning")

    async def main() -> None:
        budget = "thinking.budget_tokens is not enforced"
        unknown = "the model's chat template has no place for"
        assert await prompt_and_warning(talker, tokens, thinking=thinking) == ("<think>\n", budget)
        assert await prompt_and_warning(talker, tokens, thinking={"type": "adaptive"}) == ("<think>\n", None)
        assert await prompt_and_warning(talker, tokens, thinking={"type": "disabled"}) == ("", None)
        fields = {"thinking": thinking, "output_config": {"effort": "max"}}
        told = f"{budget}; {unknown} thinking; {unknown} output_config.effort"
        assert await prompt_and_warning(model, raw_tokenizer, **fields) == ("", told)

    run(main())


def test_a_form_that_the_answer_must_have(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):
            world.router.answer = saying(tokens, '{"city": "x"}')
            wish = {"format": {"type": "json_schema", "schema": SCHEMA}}
            message = await both(http, output_config=wish)
            assert message["content"] == [{"type": "text", "text": '{"city": "x"}'}]
            for asked in world.router.served.values():
                grammar = asked.message.sampling.grammar
                assert grammar is not None and grammar.kind == "json_schema"
            unfit = {"format": {"type": "json_schema", "schema": {"type": "array", "uniqueItems": True}}}
            reply = await http.post(MESSAGES, json={**BODY, "output_config": unfit})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "output_config.format")
            assert "uniqueItems" in reply.json()["error"]["message"]
            unfit_tool = {"name": "f", "input_schema": {"not": {}}, "strict": True}
            reply = await http.post(MESSAGES, json={**BODY, "tools": [unfit_tool]})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "tools[0].input_schema")

    run(main())


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "now"}])
def test_a_call_that_must_be_made_is_enforced(talker: Path, tokens: Tokenizer, choice: Any) -> None:
    async def main() -> None:
        async with served(talker) as (world, http):
            world.router.answer = saying(tokens, call("now"))
            message = await both(http, tools=TOOLS, tool_choice=choice)
            assert (message["stop_reason"], message["content"][0]["name"]) == ("tool_use", "now")
            for asked in world.router.served.values():
                grammar = asked.message.sampling.grammar
                assert grammar is not None and grammar.kind == "lark"

    run(main())
