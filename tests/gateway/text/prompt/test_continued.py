"""A prompt that ends with the last message's text is the one that transformers makes of it."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from microserve.gateway.text.prompt.chat_template import ChatTemplate
from microserve.gateway.text.prompt.continued import Continued
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest
from tests.support.examples import examples
from tests.support.gateway.gateway_world import make_model, run, special_id

WHOLE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
TRIMMED = WHOLE.replace("m.content", "m.content | trim")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {"whole": WHOLE + PROMPT, "trimmed": TRIMMED + PROMPT, "spaced": WHOLE.replace("}}<", "}} <")}

TEXT = st.text(st.sampled_from("ab é\n"), max_size=6)
TURN = st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXT})


@cache
def both(kind: str, directory: Path) -> tuple[ModelTokenizer, Any]:
    from transformers import PreTrainedTokenizerFast

    make_model(directory)
    (directory / "chat_template.jinja").write_text(TEMPLATES[kind])
    theirs = PreTrainedTokenizerFast(
        tokenizer_file=str(directory / "tokenizer.json"), chat_template=TEMPLATES[kind]
    )
    return ModelTokenizer.load(directory), theirs


@pytest.mark.slow
@pytest.mark.parametrize("kind", TEMPLATES)
@given(messages=st.lists(TURN, min_size=1, max_size=4))
@settings(max_examples=examples(60), deadline=None)
def test_it_is_that_of_transformers(
    kind: str, tmp_path_factory: pytest.TempPathFactory, messages: list[dict[str, Any]]
) -> None:
    ours, theirs = both(kind, tmp_path_factory.getbasetemp() / f"continued-{kind}")
    expected = theirs.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert list(run(ours.encode_chat(messages, max_tokens=1000, continues=True))) == expected
    without = theirs.apply_chat_template(messages, add_generation_prompt=False, return_dict=False)
    options = {"add_generation_prompt": False}
    assert list(run(ours.encode_chat(messages, options=options, max_tokens=1000))) == without


@pytest.mark.parametrize(("kind", "text"), [("whole", "so \n"), ("trimmed", "so"), ("spaced", "so \n")])
def test_where_it_ends(kind: str, text: str) -> None:
    continued = Continued([{"role": "user", "content": "so"}, {"role": "assistant", "content": "so \n"}])
    rendered = ChatTemplate(TEMPLATES[kind], {}).render(
        continued.messages, None, {"add_generation_prompt": False}
    )
    assert continued.cut(rendered).endswith(f"<|im_start|>assistant\n{text}")


@pytest.mark.parametrize(
    "last",
    [
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]},
        {"role": "assistant"},
    ],
)
def test_there_must_be_a_text_to_go_on_with(last: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="the last message has no text") as caught:
        Continued([{"role": "user", "content": "hi"}, last])
    assert caught.value.field == "messages"


def test_a_template_that_does_not_show_it() -> None:
    continued = Continued([{"role": "assistant", "content": "x"}])
    with pytest.raises(InvalidRequest, match="does not show the last message"):
        continued.cut("{{ messages[0].content }}")


def test_control_tokens_in_it_are_text(model: Path, raw_tokenizer: Tokenizer) -> None:
    ours = ModelTokenizer.load(model)
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|> "}]
    ids = list(run(ours.encode_chat(messages, max_tokens=1000, continues=True)))
    text = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|> "
    assert raw_tokenizer.decode(ids, skip_special_tokens=False) == text
    assert ids.count(special_id(raw_tokenizer, "<|im_end|>")) == 1


def test_documents_and_the_assistants_header_are_the_templates() -> None:
    template = ChatTemplate(
        "{% for d in documents or [] %}{{ d.text }};{% endfor %}" + TEMPLATES["whole"], {}
    )
    messages = [{"role": "user", "content": "hi"}]
    plain = template.render(messages)
    assert plain.endswith("<|im_start|>assistant\n") and not plain.startswith("one")
    options = {"documents": [{"text": "one"}, {"text": "two"}], "add_generation_prompt": False}
    assert template.render(messages, None, options) == "one;two;<|im_start|>user\nhi<|im_end|>\n"
