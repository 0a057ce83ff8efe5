"""vLLM's fields and OpenAI's that change no token: what each of them comes to, and the model's card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.chat import chat_request
from microserve.gateway.openai.completions import completion_request
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from microserve.gateway.request.prompts import prompts_of
from microserve.gateway.request.request import GenerateRequest
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.options import TextOptions
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages.request.attributes import MAX_PRIORITY
from tests.support.gateway.gateway_world import MAX_MODEL_LEN, gateway_world, run
from tests.support.gateway.talking_model import make_talking_model

USER = [{"role": "user", "content": "hi"}]
LIMITS = ModelLimits(32, 1000)


def chat(**fields: Any) -> GenerateRequest:
    return chat_request(parse(json.dumps({"model": "m", "messages": USER} | fields).encode(), ChatRequest))


def completion(prompt: Any, **fields: Any) -> GenerateRequest:
    body = json.dumps({"model": "m", "prompt": prompt} | fields).encode()
    return completion_request(parse(body, CompletionRequest))


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, TextOptions()),
        ({"skip_special_tokens": True, "include_stop_str_in_output": False}, TextOptions()),
        ({"skip_special_tokens": False}, TextOptions(skip_special_tokens=False)),
        ({"spaces_between_special_tokens": False}, TextOptions(spaces_between_special_tokens=False)),
        ({"include_stop_str_in_output": True}, TextOptions(include_stop=True)),
    ],
)
def test_how_an_answer_is_text(fields: dict[str, Any], options: TextOptions) -> None:
    assert chat(**fields).text == completion("x", **fields).text == options


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({}, 0),
        ({"priority": 0, "service_tier": "priority"}, 0),
        ({"priority": 3}, 3),
        ({"service_tier": "flex"}, 1),
        ({"priority": 2 * MAX_PRIORITY, "service_tier": "flex"}, 2 * MAX_PRIORITY + 1),
    ],
)
def test_a_request_may_give_way(fields: dict[str, Any], steps: int) -> None:
    assert chat(**fields).gives_way == steps


@pytest.mark.parametrize("priority", [-1, 2 * MAX_PRIORITY + 1, 0.5, "high"])
def test_and_never_push_ahead(priority: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(priority=priority)
    assert caught.value.field == "priority"


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"store": False, "stream": True, "stream_options": {"include_obfuscation": True}}, []),
        ({"store": True}, ["store"]),
        ({"prediction": {"type": "content", "content": "x"}}, ["prediction"]),
        ({"stream": True, "stream_options": {"continuous_usage_stats": True}}, ["stream_options"]),
    ],
)
def test_what_is_not_done_is_told(fields: dict[str, Any], told: list[str]) -> None:
    assert [each.partition(":")[0].partition(".")[0] for each in chat(**fields).warnings] == told


@pytest.mark.parametrize(
    ("num_tokens", "fields", "num_kept"),
    [
        (40, {"truncate_prompt_tokens": 5}, 5),
        (4, {"truncate_prompt_tokens": 5}, 4),
        (40, {"truncate_prompt_tokens": 32}, 32),
        (40, {"truncate_prompt_tokens": -1, "max_tokens": 10}, 22),
        (40, {"truncate_prompt_tokens": -1}, 16),
        (40, {"truncate_prompt_tokens": -1, "max_tokens": 1000}, 1),
    ],
)
def test_a_prompt_keeps_its_last_tokens(
    tokenizer: ModelTokenizer, num_tokens: int, fields: dict[str, Any], num_kept: int
) -> None:
    ids = list(range(num_tokens))
    assert run(prompts_of(completion([ids, ids], **fields), tokenizer, LIMITS)) == [ids[-num_kept:]] * 2
    [cut] = run(prompts_of(completion("a" * num_tokens, **fields), tokenizer, LIMITS))
    assert len(cut) == min(num_kept, num_tokens)


def test_a_conversation_that_is_cut(tokenizer: ModelTokenizer) -> None:
    long = [{"role": "user", "content": "x" * 5000}]
    [whole] = run(prompts_of(chat(messages=long), tokenizer, ModelLimits(10_000, 1000)))
    [cut] = run(prompts_of(chat(messages=long, truncate_prompt_tokens=8), tokenizer, LIMITS))
    assert list(cut) == list(whole[-8:])


@pytest.mark.parametrize("wish", [0, -2, 33, 1.5])
def test_a_cut_that_is_none(tokenizer: ModelTokenizer, wish: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        run(prompts_of(chat(truncate_prompt_tokens=wish), tokenizer, LIMITS))
    assert caught.value.field == "truncate_prompt_tokens"


def test_variables_of_a_template(tmp_path: Path) -> None:
    """``documents``, ``verbosity`` and ``add_generation_prompt``: taken where the template looks at them, let
    through where they ask for nothing, else refused."""
    directory = make_talking_model(tmp_path / "talker")
    template = (
        "{% for d in documents or [] %}{{ d.text }}{% endfor %}{{ verbosity }}{{ messages[0].content }}"
    )
    (directory / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}>{% endif %}")
    knowing = ModelTokenizer.load(directory)
    fields = {"documents": [{"text": "d"}], "verbosity": "low", "add_generation_prompt": False}
    [ids] = run(prompts_of(chat(**fields), knowing, LIMITS))
    assert knowing.decode(ids) == "dlowhi"

    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    plain = ModelTokenizer.load(directory)
    nothing = {"documents": [], "verbosity": "medium", "add_generation_prompt": True}
    assert plain.decode(run(prompts_of(chat(**nothing), plain, LIMITS))[0]) == "hi"
    for name, value in fields.items():
        with pytest.raises(InvalidRequest) as caught:
            run(prompts_of(chat(**{name: value}), plain, LIMITS))
        assert caught.value.field == name


def test_over_http(tmp_path: Path) -> None:
    """The card of the model, and tokenising by vLLM's fields."""

    async def main() -> None:
        directory = make_talking_model(tmp_path / "talker")
        async with gateway_world(directory) as world, httpx.AsyncClient(base_url=world.address) as http:
            [card] = (await http.get("/v1/models")).json()["data"]
            assert card == (await http.get("/v1/models/tiny")).json()
            assert card["max_model_len"] == card["context_length"] == MAX_MODEL_LEN
            assert (card["root"], card["parent"], card["dtype"], card["quantization"]) == (
                ("tiny", None, "bfloat16", None)
            )
            able = card["capabilities"]
            assert able["tools"] and able["required_tools"] and able["reasoning"]
            assert able["reasoning_options"] == ["reasoning_effort", "enable_thinking"]

            async def tokens(**body: Any) -> Any:
                reply = await http.post("/tokenize", json=body)
                return reply.json() if reply.status_code == 200 else reply.json()["error"]["param"]

            plain = await tokens(messages=USER, return_token_strs=True)
            assert plain["count"] == len(plain["tokens"]) == len(plain["token_strs"])
            assert plain["token_strs"][0] == "<|im_start|>"
            going_on = await tokens(messages=USER, continue_final_message=True)
            assert (
                going_on["tokens"] == plain["tokens"][: going_on["count"]] and going_on["token_strs"] is None
            )
            thinking = await tokens(messages=USER, chat_template_kwargs={"enable_thinking": True})
            assert thinking["count"] > plain["count"]
            assert await tokens(messages=USER, add_special_tokens=True) == "add_special_tokens"
            assert await tokens(messages=USER, add_generation_prompt=False) == "add_generation_prompt"
            both = {"continue_final_message": True, "add_generation_prompt": True}
            assert await tokens(messages=USER, **both) == "continue_final_message"
            assert (await tokens(prompt="hi", add_special_tokens=False))["count"] > 0

            info = (await http.get("/tokenizer_info")).json()
            assert info["chat_template"].startswith("{% if tools %}")
            assert info["model_max_length"] == MAX_MODEL_LEN and "tokenizer_class" in info

    run(main())
