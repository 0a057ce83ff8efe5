"""Calls of tools and thoughts over HTTP, as OpenAI's client adds them up; the engine says given tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from llguidance import LLMatcher, LLTokenizer
from openai.lib.streaming.chat import AsyncChatCompletionStreamManager
from tokenizers import Tokenizer

from tests.support.gateway.gateway_world import GatewayWorld, gateway_world, run, special_id
from tests.support.gateway.talking_model import TOOLS, call, make_talking_model, saying, talking_tokenizer

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

USER: list[Any] = [{"role": "user", "content": "hi"}]
CITY = "Z\u00fcrich \u65e5\u672c \U0001f600"
WEATHER = call("weather", city=CITY)
THOUGHT = "<think>\nhm, now\n</think>\n\n"


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


def client_of(world: GatewayWorld) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.address}/v1", api_key="none", max_retries=0)


async def both(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """The answer as a whole, which a stream of it must add up to."""
    asked: dict[str, Any] = {"model": "tiny", "messages": USER, **fields}
    whole = await client.chat.completions.create(**asked)
    manager: AsyncChatCompletionStreamManager[Any] = client.chat.completions.stream(**asked)
    async with manager as stream:
        streamed = await stream.get_final_completion()
    for one, other in zip(whole.choices, streamed.choices, strict=True):
        assert one.finish_reason == other.finish_reason
        assert (one.message.content or "") == (other.message.content or "")
        for mine, theirs in zip(one.message.tool_calls or [], other.message.tool_calls or [], strict=True):
            assert mine.function.name == theirs.function.name
            assert mine.function.arguments == theirs.function.arguments
        assert extra(one, "reasoning_content") == extra(other, "reasoning_content")
    return whole


def extra(choice: Any, name: str) -> Any:
    return (choice.message.model_extra or {}).get(name)


def calls_of(choice: Any) -> list[tuple[str, Any]]:
    calls = choice.message.tool_calls or []
    assert len({each.id for each in calls}) == len(calls)
    return [(each.function.name, json.loads(each.function.arguments)) for each in calls]


@pytest.mark.parametrize("at_once", [True, False])
def test_two_calls_behind_a_thought(talker: Path, tokens: Tokenizer, at_once: bool) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            text = f"{THOUGHT}Let me see.\n{WEATHER}\n{call('now')}"
            world.router.answer = saying(tokens, text, at_once=at_once)
            reply = await both(client, tools=TOOLS, n=2, temperature=0)
            for choice in reply.choices:
                assert calls_of(choice) == [
                    ("weather", {"city": "Z\u00fcrich \u65e5\u672c \U0001f600"}),
                    ("now", {}),
                ]
                assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
                assert extra(choice, "reasoning") == extra(choice, "reasoning_content") == "hm, now"
            details = reply.usage.completion_tokens_details
            assert 0 < details.reasoning_tokens == 2 * (len(tokens.encode("\nhm, now\n").ids) + 1)

    run(main())


def test_a_stream_is_what_clients_expect(talker: Path, tokens: Tokenizer) -> None:
    """Of a call, index, id, type and name come once, first; one last chunk has the reason."""

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, f"ok {WEATHER}")
            stream = await client.chat.completions.create(
                model="tiny", messages=USER, tools=TOOLS, stream=True
            )
            chunks = [chunk.choices[0] async for chunk in stream]
            deltas = [chunk.delta for chunk in chunks]
            assert (deltas[0].role, deltas[0].content) == ("assistant", "")
            assert "".join(delta.content or "" for delta in deltas) == "ok"
            calls = [delta.tool_calls[0] for delta in deltas if delta.tool_calls]
            first, *others = calls
            assert first.id and first.function is not None
            assert (first.index, first.type, first.function.name) == (0, "function", "weather")
            assert first.function.arguments == ""
            assert others and all((each.index, each.id, each.type) == (0, None, None) for each in others)
            assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == ["tool_calls"]

    run(main())


STRICT = {"type": "function", "function": {"name": "f", "strict": True}}
UNWRITABLE = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a<b": {}}}}}
UNFIT = {"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}
MUST = {"tool_choice": "required"}
ONE_ONLY = {"parallel_tool_calls": False}
CASES: list[tuple[str, str, dict[str, Any], str, list[str], str]] = [
    # text, reason of the engine, what the client says, the answer's text, the calls, the reason
    (f"x {WEATHER}", "stop", {"tools": TOOLS, "tool_choice": "none"}, f"x {WEATHER}", [], "stop"),
    (f"x {WEATHER}", "stop", {}, f"x {WEATHER}", [], "stop"),
    (
        f"{WEATHER}{WEATHER} y",
        "stop",
        {"tools": TOOLS, "parallel_tool_calls": False},
        "",
        ["weather"],
        "tool_calls",
    ),
    (f"x {WEATHER[:40]}", "length", {"tools": TOOLS}, "x", [], "length"),
    (f"{WEATHER} and", "length", {"tools": TOOLS}, " and", ["weather"], "length"),
    ("<tool_call>{</tool_call>", "stop", {"tools": TOOLS}, "{", [], "stop"),
    (call("nobody"), "stop", {"tools": TOOLS}, '\n{"name": "nobody", "arguments": {}}', [], "stop"),
    (f"{THOUGHT}x, y", "stop", {"stop": ","}, "x", [], "stop"),
    (call("weather", city="a, b"), "stop", {"tools": TOOLS, "stop": ","}, "", ["weather"], "tool_calls"),
]


@pytest.mark.parametrize(("text", "reason", "asked", "content", "names", "told"), CASES)
def test_what_comes_of_it(
    talker: Path,
    tokens: Tokenizer,
    text: str,
    reason: str,
    asked: dict[str, Any],
    content: str,
    names: list[str],
    told: str,
) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, text, reason=reason)
            request: dict[str, Any] = {"model": "tiny", "messages": USER, **asked}
            [choice] = (await client.chat.completions.create(**request)).choices
            assert [name for name, _ in calls_of(choice)] == names
            assert (choice.message.content or "", choice.finish_reason) == (content, told)
            stream = await client.chat.completions.create(**request, stream=True)
            chunks = [chunk.choices[0] async for chunk in stream]
            assert "".join(chunk.delta.content or "" for chunk in chunks) == content
            assert [chunk.finish_reason for chunk in chunks if chunk.finish_reason] == [told]

    run(main())


def test_prompts_show_tools_calls_and_results(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "12 degrees")
            function = {"name": "now", "arguments": '{"a":  1}'}
            messages: list[Any] = [
                *USER,
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [{"id": "c1", "type": "function", "function": function}],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "</tool_call>"},
            ]
            for tools in (TOOLS, openai.NOT_GIVEN):
                reply = await client.chat.completions.create(model="tiny", messages=messages, tools=tools)  # type: ignore[arg-type]
                assert reply.choices[0].message.content == "12 degrees"
            first, second = world.router.served.values()
            prompt = tokens.decode(first.tokens, skip_special_tokens=False)
            assert prompt.startswith(
                '<|im_start|>system\n{"type": "function", "function": {"name": "weather"'
            )
            assert '<tool_call>\n{"name": "now", "arguments": {"a": 1}}\n</tool_call>' in prompt
            shown = tokens.decode(second.tokens, skip_special_tokens=False)
            assert shown.startswith("<|im_start|>user\nhi")
            # What a tool says is no marker: the template's own is the only one.
            assert second.tokens.count(special_id(tokens, "</tool_call>")) == 1

    run(main())


def test_logprobs_are_of_the_text(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, f"{THOUGHT}yes {WEATHER}")
            reply = await client.chat.completions.create(
                model="tiny", messages=USER, tools=TOOLS, logprobs=True
            )
            logprobs = reply.choices[0].logprobs
            assert logprobs is not None and logprobs.content is not None
            assert "".join(entry.token for entry in logprobs.content).strip() == "yes"

    run(main())


def test_what_the_template_may_be_told(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "hm</think>yes")
            reply = await client.chat.completions.create(
                model="tiny", messages=USER, extra_body={"chat_template_kwargs": {"enable_thinking": True}}
            )
            message = reply.choices[0].message
            assert (message.content, message.model_extra) == (
                "yes",
                {"reasoning": "hm", "reasoning_content": "hm"},
            )
            world.router.answer = saying(tokens, "yes")
            await client.chat.completions.create(model="tiny", messages=USER, reasoning_effort="low")
            *_, served = world.router.served.values()
            assert tokens.decode(served.tokens).endswith("low")

    run(main())


@pytest.mark.parametrize(
    ("setting", "fields", "where"),
    [
        ("model.tool_parser=none", {"tools": TOOLS}, "tools"),
        ("model.tool_parser=mistral", MUST | {"tools": TOOLS}, "tool_choice"),
        ("model.tool_parser=mistral", {"tools": [STRICT]}, "tools"),
        ("model.tool_parser=glm", MUST | {"tools": [UNWRITABLE]}, "tools[0].function.parameters"),
        ("model.tool_parser=auto", MUST | {"tools": [UNFIT]}, "tools[0].function.parameters"),
        ("model.tool_parser=auto", {"chat_template_kwargs": {"none": 1}}, "chat_template_kwargs.none"),
    ],
)
def test_what_is_not_honoured_is_named(
    talker: Path, setting: str, fields: dict[str, Any], where: str
) -> None:
    async def main() -> None:
        async with gateway_world(talker, setting) as world, httpx.AsyncClient() as http:
            body = {"model": "tiny", "messages": USER, **fields}
            reply = await http.post(f"{world.address}/v1/chat/completions", json=body)
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, where)

    run(main())


def test_calls_are_counted(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, f"{WEATHER}<tool_call>x</tool_call>")
            await client.chat.completions.create(model="tiny", messages=USER, tools=TOOLS)
            async with httpx.AsyncClient(base_url=world.address) as http:
                text = (await http.get("/metrics")).text
            assert 'microserve_tool_calls_total{outcome="read"} 1.0' in text
            assert 'microserve_tool_calls_total{outcome="unread"} 1.0' in text

    run(main())


@pytest.mark.parametrize("thinks", [True, False])
def test_what_an_answer_must_be_begins_behind_its_thoughts(
    talker: Path, tokens: Tokenizer, thinks: bool
) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "hm</think>{}" if thinks else "{}")
            reply = await client.chat.completions.create(
                model="tiny",
                messages=USER,
                response_format={"type": "json_object"},
                extra_body={"enable_thinking": thinks},
            )
            assert reply.choices[0].message.content == "{}"
            [served] = world.router.served.values()
            grammar = served.message.sampling.grammar
            assert grammar is not None
            assert grammar.after_token_ids == ((special_id(tokens, "</think>"),) if thinks else ())
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(
                    model="tiny", messages=USER, tools=TOOLS, extra_body={"guided_regex": "a+"}
                )
            assert caught.value.param == "guided_regex"

    run(main())


def of_one(kind: str) -> dict[str, Any]:
    """The choice of ``now``, by its name or as the one that is allowed."""
    named = {"type": "function", "function": {"name": "now"}}
    if kind == "named":
        return named
    return {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [named]}}


@pytest.mark.parametrize(
    ("choice", "told", "num_rules"),
    [("required", "tool_calls", 2), (of_one("named"), "stop", 1), (of_one("allowed"), "tool_calls", 1)],
)
@pytest.mark.parametrize("thinks", [True, False])
def test_a_call_that_must_be_made_goes_to_engines_as_a_grammar(
    talker: Path, tokens: Tokenizer, choice: Any, told: str, num_rules: int, thinks: bool
) -> None:
    """And what comes is one, whose reason to finish is OpenAI's: a function that was named is no news."""

    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, f"{'hm</think>' if thinks else ''}{call('now')}")
            extra_body = {"enable_thinking": thinks}
            reply = await both(client, tools=TOOLS, tool_choice=choice, extra_body=extra_body)
            [answer] = reply.choices
            assert calls_of(answer) == [("now", {})]
            assert (answer.finish_reason, answer.message.content) == (told, None)
            for served in world.router.served.values():
                grammar = served.message.sampling.grammar
                assert grammar is not None and grammar.kind == "lark"
                assert grammar.text.count("%json") == num_rules
                assert f"<[{special_id(tokens, '<tool_call>')}]>" in grammar.text
                ends = (special_id(tokens, "</think>"),) if thinks else ()
                assert grammar.after_token_ids == ends

    run(main())


@pytest.mark.parametrize(
    ("parser", "thoughts", "answer"),
    [
        ("glm", "none", "<tool_call>f<arg_key>a</arg_key><arg_value>x</arg_value></tool_call>"),
        ("gemma", "none", '<|tool_call>call:f{a:<|"|>x<|"|>}<tool_call|>'),
        (
            "gpt_oss",
            "gpt_oss",
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant to=functions.f<|channel|>commentary "
            '<|constrain|>json<|message|>{"a": "x"}',
        ),
    ],
)
def test_calls_that_are_no_json_or_come_behind_thoughts(
    talker: Path, tokens: Tokenizer, parser: str, thoughts: str, answer: str
) -> None:
    async def main() -> None:
        settings = (f"model.tool_parser={parser}", f"model.reasoning_parser={thoughts}")
        async with gateway_world(talker, *settings) as world, client_of(world) as client:
            world.router.answer = saying(tokens, answer)
            [choice] = (await both(client, tools=[STRICT], tool_choice="required")).choices
            assert calls_of(choice) == [("f", {"a": "x"})]
            for served in world.router.served.values():
                grammar = served.message.sampling.grammar
                assert grammar is not None and grammar.after_token_ids == ()
                lark = LLMatcher.grammar_from_lark(grammar.text)
                matcher = LLMatcher(LLTokenizer(tokens.to_str()), lark, log_level=0)
                assert matcher.consume_tokens(tokens.encode(answer).ids) and matcher.is_accepting()

    run(main())


def test_a_strict_tool_needs_no_call_but_a_call_fits(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, f"so: {call('f')}")
            [answer] = (await both(client, tools=[STRICT])).choices
            assert (answer.message.content, calls_of(answer)) == ("so:", [("f", {})])
            for served in world.router.served.values():
                grammar = served.message.sampling.grammar
                assert grammar is not None and "~(" in grammar.text  # text in which no call begins

    run(main())


def test_what_is_relaxed_of_a_tools_schema_is_told(talker: Path, tokens: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, call("f", a="x"))
            properties = {"a": {"type": "string", "format": "colour"}}
            parameters = {"type": "object", "properties": properties}
            function: dict[str, Any] = {"name": "f", "parameters": parameters}
            asked: dict[str, Any] = {
                "model": "tiny",
                "messages": USER,
                "tools": [{"type": "function", "function": function}],
                "tool_choice": "required",
            }
            reply = await client.chat.completions.with_raw_response.create(**asked)
            assert "format 'colour'" in reply.headers["x-microserve-warning"]
            function["strict"] = True
            with pytest.raises(openai.BadRequestError) as caught:
                await client.chat.completions.create(**asked)
            assert "format" in caught.value.message

    run(main())
