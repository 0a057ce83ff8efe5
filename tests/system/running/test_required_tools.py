"""Calls that must be made, on a mesh of real processes: each fits its tool's schema, under every strategy and
with n = 3, and an engine that is killed or leaves in the middle of them changes none."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from canitoolcall.checks import schema_errors

from microserve.services.router.strategies import BUILT_IN
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.gateway.gateway_world import special_id
from tests.support.gateway.talking_model import make_talking_model, talking_tokenizer
from tests.support.process.nursery import Process
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(300)]

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Zürich", "日本 😀", "</tool_call>"]},
        "days": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 6},
        "unit": {"type": ["string", "null"], "maxLength": 40},
    },
    "required": ["city", "days", "unit"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("weather", "trip")
]
STRATEGIES = [strategy.name for strategy in BUILT_IN]
MAX_TOKENS = 3000


def make_model(directory: Path) -> Path:
    """Random weights, and a template that knows tools; a call ends it."""
    tokenizer = talking_tokenizer()
    make_tiny_model(directory, vocab=tokenizer.get_vocab_size() + 1)
    (directory / "chat_template.jinja").unlink()
    make_talking_model(directory)
    file = directory / "generation_config.json"
    generation = json.loads(file.read_text())
    file.write_text(json.dumps(generation | {"eos_token_id": [special_id(tokenizer, "<|im_end|>")]}))
    return directory


async def ask(client: openai.AsyncOpenAI, number: int, salt: str) -> list[list[tuple[str, str]]]:
    """The calls of each choice of one streamed answer, as OpenAI's client adds them up."""
    n = 3 if number % 4 == 3 else 1
    named = {"type": "function", "function": {"name": "trip"}}
    manager = client.chat.completions.stream(
        model="tiny",
        messages=[{"role": "user", "content": f"where to, {number}?"}],
        tools=TOOLS,
        tool_choice=named if number % 3 == 0 else "required",  # type: ignore[arg-type]
        parallel_tool_calls=number % 2 == 0,
        seed=number,
        n=n,
        max_tokens=MAX_TOKENS,
        extra_headers={"x-microserve-strategy": STRATEGIES[number % len(STRATEGIES)]},
        extra_body={"cache_salt": salt},
    )
    async with manager as stream:
        choices = (await stream.get_final_completion()).choices
    assert len(choices) == n
    found = []
    for choice in choices:
        calls = choice.message.tool_calls or []
        assert choice.finish_reason == ("stop" if number % 3 == 0 else "tool_calls")
        assert calls and not choice.message.content
        for call in calls:
            assert not schema_errors(SCHEMA, json.loads(call.function.arguments))
            allowed = ("trip",) if number % 3 == 0 else ("weather", "trip")
            assert call.function.name in allowed
        found.append([(call.function.name, call.function.arguments) for call in calls])
    return found


@pytest.mark.heavy
def test_calls_fit_their_schema_and_outlive_an_engine(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny")
    settings = ["model.name=tiny", "model.dtype=float32", "engine.drain_s=0.2"]
    with MeshProcesses(model, tmp_path, num_engines=3, gateway=True, settings=settings) as mesh:
        asyncio.run(_ask_and_kill(mesh))


async def _ask_and_kill(mesh: MeshProcesses) -> None:
    base = f"http://127.0.0.1:{mesh.gateway_port}"
    async with httpx.AsyncClient() as http, asyncio.timeout(60):
        while (await http.get(f"{base}/ready")).status_code != 200:
            await asyncio.sleep(0.05)
    async with openai.AsyncOpenAI(
        base_url=f"{base}/v1", api_key="none", timeout=120, max_retries=0
    ) as client:
        numbers = range(len(STRATEGIES))
        expected = await asyncio.gather(*(ask(client, number, "before") for number in numbers))
        assert all(expected)
        for engine, harm in (("engine-0", Process.kill), ("engine-1", Process.terminate)):
            asked = [asyncio.create_task(ask(client, number, engine)) for number in numbers]
            await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
            harm(mesh.services[engine].process)
            assert await asyncio.gather(*asked) == expected
