"""What a request may leave open: hints to a template, a bound that is cut to fit, a text to go on with."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer

from microserve.gateway.request.prompts import prompts_of
from microserve.gateway.request.request import (
    Conversation,
    GenerateRequest,
    SamplingWish,
    TemplateOption,
    Texts,
    Turn,
)
from microserve.gateway.request.sampling import MAX_PROMPT_PAIRS, check_prompts, sampling_of
from microserve.gateway.routers.link import ModelLimits
from microserve.gateway.text.tokenizer import ModelTokenizer
from microserve.protocol.errors import InvalidRequest, PromptTooLong
from tests.support.gateway.gateway_world import make_model, run
from tests.support.gateway.talking_model import make_talking_model, talking_tokenizer

LIMITS = ModelLimits(max_model_len=1000, vocab_size=500)
HI = Turn(role="user", content="hi")


def prompt_of(request: GenerateRequest, tokenizer: ModelTokenizer, raw: Tokenizer) -> str:
    [ids] = run(prompts_of(request, tokenizer, LIMITS))
    return raw.decode(ids, skip_special_tokens=False)


def request(*turns: Turn, continues: bool = False, **options: TemplateOption) -> GenerateRequest:
    return GenerateRequest(model="m", prompt=Conversation(list(turns), options, continues=continues))


def test_a_hint_that_a_template_does_not_look_at_is_a_warning(tmp_path: Path) -> None:
    tokenizer = ModelTokenizer.load(make_talking_model(tmp_path / "talker"))
    asked = request(
        HI,
        enable_thinking=TemplateOption(True, "thinking", is_hint=True),
        budget=TemplateOption(3, "thinking.budget", is_hint=True),
    )
    asked.warnings.append("before")
    assert prompt_of(asked, tokenizer, talking_tokenizer()).endswith("<|im_start|>assistant\n<think>\n")
    assert asked.warnings == ["before", "the model's chat template has no place for thinking.budget"]
    with pytest.raises(InvalidRequest) as error:
        prompt_of(request(HI, budget=TemplateOption(3, "b")), tokenizer, talking_tokenizer())
    assert error.value.field == "b"


def test_an_answer_goes_on_with_the_last_turn(tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer) -> None:
    begun = Turn(role="assistant", content="The answer is (")
    shown = prompt_of(request(HI, begun, continues=True), tokenizer, raw_tokenizer)
    assert shown == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nThe answer is ("
    with pytest.raises(InvalidRequest):
        prompt_of(request(HI, Turn(role="assistant", content=None), continues=True), tokenizer, raw_tokenizer)


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('not here') }}"
    "{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_late_instructions_are_the_users_where_a_template_takes_none(
    tmp_path: Path, tokenizer: ModelTokenizer, raw_tokenizer: Tokenizer
) -> None:
    model = make_model(tmp_path / "strict")
    (model / "chat_template.jinja").write_text(STRICT)
    strict = ModelTokenizer.load(model)
    turns = [
        Turn(role="system", content="Be."),
        HI,
        Turn(role="system", content="Be brief."),
        Turn(role="assistant", content="yes"),
        Turn(role="system", content="Now."),
    ]
    for used, role, between in ((strict, "user", "\n"), (tokenizer, "system", None)):
        asked = GenerateRequest(model="m", prompt=Conversation(turns, folds_system=True))
        border = between or "<|im_end|>\n<|im_start|>system\n"
        assert prompt_of(asked, used, raw_tokenizer) == (
            f"<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nhi{border}Be brief.<|im_end|>\n"
            f"<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>{role}\nNow.<|im_end|>\n<|im_start|>assistant\n"
        )
    asked = GenerateRequest(model="m", prompt=Conversation(turns), names={"prompt": "input"})
    with pytest.raises(InvalidRequest) as error:
        prompt_of(asked, strict, raw_tokenizer)
    assert error.value.field == "input"


def test_a_template_that_refuses_without_late_instructions_has_its_say(
    tmp_path: Path, raw_tokenizer: Tokenizer
) -> None:
    model = make_model(tmp_path / "strict")
    (model / "chat_template.jinja").write_text("{{ raise_exception('never') }}")
    for turns in ([HI], [HI, Turn(role="system", content="Be."), HI]):
        asked = GenerateRequest(model="m", prompt=Conversation(turns, folds_system=True))
        with pytest.raises(InvalidRequest, match="never"):
            prompt_of(asked, ModelTokenizer.load(model), raw_tokenizer)


def test_a_bound_is_cut_to_fit_where_the_client_says_so() -> None:
    def max_tokens(wish: SamplingWish) -> int:
        return sampling_of(
            GenerateRequest(model="m", prompt=Conversation([]), sampling=wish), LIMITS, 10
        ).max_tokens

    assert max_tokens(SamplingWish(max_tokens=5000, is_max_cut=True)) == 990
    assert max_tokens(SamplingWish(max_tokens=50, is_max_cut=True)) == 50
    with pytest.raises(PromptTooLong):
        max_tokens(SamplingWish(max_tokens=5000))


@pytest.mark.parametrize("counts", [{"n": 2}, {"best_of": 2}, {"n": 2, "shows_prompt": True}])
def test_what_is_told_of_a_prompt_is_bounded_for_all_choices_together(counts: dict[str, int]) -> None:
    """Each tells of it anew: as many objects, as many bytes of an answer."""
    limits = ModelLimits(max_model_len=MAX_PROMPT_PAIRS, vocab_size=500)
    prompts = [[1] * (MAX_PROMPT_PAIRS // 4)]
    wish = SamplingWish(max_tokens=1, prompt_logprobs=1)

    def check(**fields: int) -> None:
        asked = msgspec.structs.replace(
            GenerateRequest(model="m", prompt=Texts([""]), sampling=wish), **fields
        )
        check_prompts(asked, sampling_of(asked, limits, len(prompts[0])), prompts)

    check(**counts)
    with pytest.raises(InvalidRequest, match=f"{3 * MAX_PROMPT_PAIRS // 2} log-probabilities"):
        check(**{name: count if count is True else count + 1 for name, count in counts.items()})
