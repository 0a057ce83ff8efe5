"""``pydantic-ai``: agents with tools, and typed answers in its ways."""

from __future__ import annotations

from typing import Any, Literal

from checks import MESH, MESH_MODEL, TALKER, TALKER_MODEL, call_text, check, main
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Person(BaseModel):
    """Somebody."""

    name: str
    kind: Literal["child", "adult"]


def mesh() -> OpenAIChatModel:
    return OpenAIChatModel(MESH_MODEL, provider=OpenAIProvider(base_url=f"{MESH}/v1", api_key="none"))


def talker() -> OpenAIChatModel:
    return OpenAIChatModel(TALKER_MODEL, provider=OpenAIProvider(base_url=f"{TALKER}/v1", api_key="none"))


@check("text, whole and streamed")
async def text() -> None:
    agent = Agent(talker())
    answer = await agent.run("say: Hello.")
    assert answer.output == "Hello."
    assert answer.usage.output_tokens > 0
    async with agent.run_stream("say: Hello.") as stream:
        assert await stream.get_output() == "Hello."


@check("tools: calls, results, an answer, whole and streamed")
async def tools() -> None:
    agent = Agent(talker())

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"12 in {city}"

    asked = f"say: I look.{call_text('weather', city='Rome')}"
    assert (await agent.run(asked)).output == "The tool said 12 in Rome."
    async with agent.run_stream(f"say: {call_text('weather', city='Rome')}") as stream:
        assert await stream.get_output() == "The tool said 12 in Rome."


@check("the Responses API: text, tools, NativeOutput, ToolOutput, streamed")
async def responses() -> None:
    saying = OpenAIResponsesModel(
        TALKER_MODEL, provider=OpenAIProvider(base_url=f"{TALKER}/v1", api_key="none")
    )
    agent = Agent(saying)

    @agent.tool_plain
    def weather(city: str) -> str:
        """The weather in a city."""
        return f"12 in {city}"

    asked = f"say: I look.{call_text('weather', city='Rome')}"
    assert (await agent.run(asked)).output == "The tool said 12 in Rome."
    meshed = OpenAIResponsesModel(MESH_MODEL, provider=OpenAIProvider(base_url=f"{MESH}/v1", api_key="none"))
    for kind in (ToolOutput(Person), NativeOutput(Person, strict=True)):
        typed: Agent[None, Any] = Agent(meshed, output_type=kind, retries=0)
        assert isinstance((await typed.run("hi")).output, Person)
        async with typed.run_stream("hi") as stream:
            assert isinstance(await stream.get_output(), Person)


@check("tools together with NativeOutput, chat and responses")
async def both() -> None:
    provider = OpenAIProvider(base_url=f"{TALKER}/v1", api_key="none")
    for model in (talker(), OpenAIResponsesModel(TALKER_MODEL, provider=provider)):
        agent = Agent(model, output_type=NativeOutput(Person), retries=0)

        @agent.tool_plain
        def weather(city: str) -> str:
            """The weather in a city."""
            return f"12 in {city}"

        answer = await agent.run('say: {"name": "Ada", "kind": "adult"}')
        assert answer.output == Person(name="Ada", kind="adult")


@check("output: ToolOutput, NativeOutput, PromptedOutput, streamed")
async def output() -> None:
    kinds: list[Any] = [Person, ToolOutput(Person), ToolOutput(Person, strict=True), NativeOutput(Person)]
    kinds += [NativeOutput(Person, strict=True)]
    for kind in kinds:
        agent: Agent[None, Any] = Agent(mesh(), output_type=kind, retries=0)
        assert isinstance((await agent.run("hi")).output, Person)
        async with agent.run_stream("hi") as stream:
            assert isinstance(await stream.get_output(), Person)
    prompted: Agent[None, Any] = Agent(talker(), output_type=PromptedOutput(Person), retries=0)
    answer = await prompted.run('say: {"name": "Ada", "kind": "adult"}')
    assert answer.output == Person(name="Ada", kind="adult")


if __name__ == "__main__":
    main()
