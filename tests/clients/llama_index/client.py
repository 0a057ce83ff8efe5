"""LlamaIndex's ``OpenAILike``."""

from __future__ import annotations

from typing import Any, Literal

from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from llama_index.core.agent.workflow import FunctionAgent
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


def on(base: str, model: str, **more: Any) -> OpenAILike:
    return OpenAILike(
        api_base=f"{base}/v1", api_key="none", model=model, is_chat_model=True, max_retries=0,
        is_function_calling_model=True, context_window=16_384, **more,
    )  # fmt: skip


mesh, talker = on(MESH, MESH_MODEL), on(TALKER, TALKER_MODEL)


class Person(BaseModel):
    """Somebody."""

    name: str
    kind: Literal["child", "adult"]


def weather(city: str) -> str:
    """The weather in a city."""
    return f"12 in {city}"


WEATHER = FunctionTool.from_defaults(weather)


@check("chat and complete, streamed")
def chat() -> None:
    asked = [ChatMessage(role="user", content="say: Hello.")]
    assert talker.chat(asked).message.content == "Hello."
    *_, last = talker.stream_chat(asked)
    assert last.message.content == "Hello."
    assert talker.complete("say: Hello.").text == "Hello."
    text_model = OpenAILike(api_base=f"{MESH}/v1", api_key="none", model=MESH_MODEL, max_tokens=8)
    assert isinstance(text_model.complete("once").text, str)


@check("function calling: auto and required")
def calling() -> None:
    asked = f"say: {call_text('weather', city='Paris')}"
    [call] = talker.get_tool_calls_from_response(talker.chat_with_tools([WEATHER], user_msg=asked))
    assert (call.tool_name, call.tool_kwargs) == ("weather", {"city": "Paris"})
    [call] = mesh.get_tool_calls_from_response(
        mesh.chat_with_tools([WEATHER], user_msg="hi", tool_required=True, allow_parallel_tool_calls=False)
    )
    assert call.tool_name == "weather" and "city" in call.tool_kwargs


@check("structured output: by a call, by a schema")
def structured() -> None:
    program = FunctionCallingProgram.from_defaults(Person, "hi", llm=mesh, tool_required=True)
    assert isinstance(program(), Person)
    by_schema = on(MESH, MESH_MODEL, should_use_structured_outputs=True)
    for llm in (mesh, by_schema):
        answer = llm.as_structured_llm(Person).complete("hi")
        assert isinstance(answer.raw, Person), answer


@check("an agent: calls, results, an answer")
async def agent() -> None:
    asked = f"say: {call_text('weather', city='Rome')}"
    answer = await FunctionAgent(tools=[WEATHER], llm=talker, streaming=True).run(asked)
    assert str(answer) == "The tool said 12 in Rome."


if __name__ == "__main__":
    main()
