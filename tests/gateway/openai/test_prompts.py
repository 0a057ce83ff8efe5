"""Messages and prompts -> token ids, and what is refused on the way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, processors

from microserve.gateway.api.parse import parse
from microserve.gateway.openai.chat import chat_request, turns_of
from microserve.gateway.openai.completions import completion_request
from microserve.gateway.openai.schema import ChatRequest, CompletionRequest
from microserve.gateway.request.prompts import prompts_of, template_messages
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.prompt.chat_template import ChatTemplate
from microserve.gateway.text.tokenizer import INLINE_CHARS, ModelTokenizer
from microserve.protocol.errors import ConfigError, InvalidRequest, PromptTooLong
from tests.support.gateway.gateway_world import TEMPLATE, make_model, run, special_id

LIMITS = ModelLimits(max_model_len=10_000, vocab_size=300)


DEEP = '{"a":' * 480 + "{}" + "}" * 480
"""Not too deep to be read, but for whatever goes through it in Python."""


def call(arguments: str) -> dict[str, Any]:
    return {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": arguments}}


def messages(*entries: dict[str, Any]) -> list[dict[str, Any]]:
    body = json.dumps({"model": "m", "messages": list(entries)}).encode()
    return template_messages(turns_of(parse(body, ChatRequest).messages))


def test_a_conversation_is_rendered_and_encoded(tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer) -> None:
    body = {
        "model": "m",
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        ],
    }
    request = chat_request(parse(json.dumps(body).encode(), ChatRequest))
    [ids] = run(prompts_of(request, tokenizer, LIMITS))
    text = raw_tokenizer.decode(ids, skip_special_tokens=False)
    assert (
        text
        == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids[0] == raw_tokenizer.token_to_id("<|im_start|>")


@pytest.mark.parametrize(
    ("entry", "where"),
    [
        ({"role": "function", "content": "x"}, "messages[0].role"),
        ({"role": "tool"}, "messages[0].content"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[0].tool_calls[0].id"),
        ({"role": "assistant", "tool_calls": [call("[1]")]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "assistant", "tool_calls": [call(DEEP)]}, "messages[0].tool_calls[0].function.arguments"),
        ({"role": "user", "content": "x", "tool_calls": [call("{}")]}, "messages[0].tool_calls"),
        ({"role": "user", "content": [{"type": "image_url", "text": "x"}]}, "messages[0].content[0].type"),
        ({"role": "user", "content": [{"type": "text"}]}, "messages[0].content[0].text"),
    ],
)
def test_a_message_that_is_not_text_is_named(entry: dict[str, Any], where: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        messages(entry)
    assert caught.value.field == where


@pytest.mark.parametrize("content", [{"content": None}, {"content": []}, {}])
def test_a_turn_of_the_assistant_may_be_empty(content: dict[str, Any]) -> None:
    """As after a refusal; a history that has one is not refused for ever."""
    assert messages({"role": "assistant", **content}) == [{"role": "assistant", "content": ""}]


def test_a_call_and_its_result_as_templates_expect_them() -> None:
    """Arguments as an object, for a template writes them itself; a turn of calls has no content."""
    assert messages(
        {"role": "assistant", "content": None, "reasoning": "hm", "tool_calls": [call('{"a": 1}')]},
        {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "2"}]},
    ) == [
        {
            "role": "assistant",
            "content": None,
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "content": "2", "tool_call_id": "call_1"},
    ]


def test_no_messages() -> None:
    with pytest.raises(InvalidRequest):
        messages()


def test_templates_get_what_published_ones_expect() -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{% if loop.index0 == 2 %}{% break %}{% endif %}"
        "{% generation %}{{ m | tojson }}{% endgeneration %}{% endfor %}{{ strftime_now('%%') }}"
    )
    template = ChatTemplate(source, {"bos_token": "<s>"})
    rendered = template.render([{"role": "user", "content": "<é>"}] * 3)
    assert rendered == '<s>{"role": "user", "content": "<é>"}{"role": "user", "content": "<é>"}%'


def test_a_template_may_refuse() -> None:
    template = ChatTemplate("{{ raise_exception('roles must alternate') }}", {})
    with pytest.raises(InvalidRequest, match="roles must alternate") as caught:
        template.render([])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "source",
    ["{{ messages.append(1) }}", "{{ ''.__class__.__mro__ }}", "{{ 1 / 0 }}", "{{ messages[0].nope.nope }}"],
)
def test_a_template_is_in_a_sandbox_and_its_mistakes_are_400(source: str) -> None:
    with pytest.raises(InvalidRequest):
        ChatTemplate(source, {}).render([{"role": "user", "content": "x"}])


def test_a_broken_template_is_a_wrong_setting() -> None:
    with pytest.raises(ConfigError):
        ChatTemplate("{% for %}", {})


@pytest.mark.parametrize("named", [True, False])
def test_where_templates_are_found(tmp_path: Path, named: bool) -> None:
    source = "from the config"
    config = {"chat_template": [{"name": "default", "template": source}] if named else source}
    found = ChatTemplate.load(tmp_path, config, {})
    assert found is not None and found.render([]) == source
    (tmp_path / "chat_template.jinja").write_text("from the file")
    found = ChatTemplate.load(tmp_path, config, {})
    assert found is not None and found.render([]) == "from the file"
    (tmp_path / "chat_template.jinja").unlink()
    assert ChatTemplate.load(tmp_path, {}, {}) is None


def test_a_model_without_a_template_refuses_chats(raw_tokenizer: Tokenizer) -> None:
    plain = ModelTokenizer(raw_tokenizer)
    with pytest.raises(InvalidRequest, match="no chat template"):
        run(plain.encode_chat([{"role": "user", "content": "x"}], max_tokens=10))
    plain.close()


def prompts(tokenizer: ModelTokenizer, prompt: Any, limits: ModelLimits = LIMITS) -> list[list[int]]:
    body = json.dumps({"model": "m", "prompt": prompt}).encode()
    request = completion_request(parse(body, CompletionRequest))
    return list(map(list, run(prompts_of(request, tokenizer, limits))))


def test_every_form_of_a_prompt(tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer) -> None:
    a, b = raw_tokenizer.encode("Hello").ids, raw_tokenizer.encode("fox").ids
    assert prompts(tokenizer, "Hello") == [a]
    assert prompts(tokenizer, ["Hello", "fox"]) == [a, b]
    assert prompts(tokenizer, [1, 2, 3]) == [[1, 2, 3]]
    assert prompts(tokenizer, [[1, 2], [3]]) == [[1, 2], [3]]


@pytest.mark.parametrize(
    "prompt", [[], "", [""], [[]], ["a", 1], [1, [2]], ["a", [1]], [-1], [300], [[1], [300]], ["a"] * 257]
)
def test_prompts_that_are_none(tokenizer: ModelTokenizer, prompt: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        prompts(tokenizer, prompt)
    assert (caught.value.field or "").startswith("prompt")


def test_a_hopelessly_long_text_is_refused_before_any_work(tokenizer: ModelTokenizer) -> None:
    with pytest.raises(PromptTooLong, match="maximum context length is 10 tokens"):
        prompts(tokenizer, "x" * 100_000, ModelLimits(max_model_len=10, vocab_size=300))


def test_long_texts_are_encoded_as_short_ones_are(
    tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    text = "Hello world, how are you today? " * (INLINE_CHARS // 16)
    assert prompts(tokenizer, text) == [raw_tokenizer.encode(text).ids]


def test_truncation_and_padding_of_a_tokenizer_file_do_not_count(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    file = str(directory / "tokenizer.json")
    cutting = Tokenizer.from_file(file)
    cutting.enable_truncation(2)
    cutting.enable_padding(length=64)
    cutting.save(file)
    loaded = ModelTokenizer.load(directory)
    text = "Hello world, how are you?"
    plain = make_plain(directory).encode(text).ids
    assert len(plain) > 2
    assert prompts(loaded, text) == [plain]
    loaded.close()


def test_special_tokens_are_added_to_prompts_and_not_to_what_a_template_made(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "m")
    file = str(directory / "tokenizer.json")
    adding = Tokenizer.from_file(file)
    begin = special_id(adding, "<|endoftext|>")
    adding.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", begin)]
    )
    adding.save(file)
    loaded = ModelTokenizer.load(directory)
    assert prompts(loaded, "a")[0][0] == begin
    chat = run(loaded.encode_chat([{"role": "user", "content": "a"}], max_tokens=100))
    assert begin not in chat
    loaded.close()


def make_plain(directory: Path) -> Tokenizer:
    plain = Tokenizer.from_file(str(directory / "tokenizer.json"))
    plain.no_truncation()
    plain.no_padding()
    return plain


@pytest.mark.parametrize(
    ("files", "detail"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json"),
        ({"chat_template.jinja": "{% for %}"}, "chat template"),
    ],
)
def test_a_directory_that_is_no_model(tmp_path: Path, files: dict[str, str], detail: str) -> None:
    directory = make_model(tmp_path / "m") if files and "tokenizer.json" not in files else tmp_path
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(ConfigError, match=detail) as caught:
        ModelTokenizer.load(directory)
    assert caught.value.field == "model.path"


def test_no_directory_at_all() -> None:
    with pytest.raises(ConfigError, match=r"model\.path is not set"):
        ModelTokenizer.load("")


def test_the_template_of_these_tests_ends_where_the_answer_begins() -> None:
    rendered = ChatTemplate(TEMPLATE, {}).render([{"role": "user", "content": "hi"}])
    assert rendered == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
