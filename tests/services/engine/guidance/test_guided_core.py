"""Constrained output over engine cores: every split, preemption, and another engine behind every token.

The tokens are a hash of all KV up to them among those that the grammar allows, so one wrong row and one wrong
mask both show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.services.engine.core.batch import Batch, StepResult
from microserve.services.engine.guidance.guide import Mask, full
from tests.support.engine.core_mesh import (
    ROUTER,
    VOCAB,
    Engine,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)
from tests.support.engine.inline_guides import GuidedMesh, InlineGuides, Made, compiler_for, schema

EOS = frozenset({0})
PERSON = schema(
    {
        "type": "object",
        "properties": {
            "name": {"enum": ["é日本😀", "ab"]},
            "ids": {
                "type": "array",
                "items": {"type": "integer", "maximum": 99, "minimum": 0},
                "maxItems": 3,
            },
        },
        "required": ["name", "ids"],
        "additionalProperties": False,
    }
)
GUIDED = SamplingParams(max_tokens=120, temperature=1.0, seed=3, grammar=PERSON, logprobs=0)
PROMPT = prompt_of(13)


@pytest.fixture
def guides(tiny_model: Path) -> InlineGuides:
    return InlineGuides(compiler_for(tiny_model, VOCAB, EOS), VOCAB)


@pytest.fixture(scope="module")
def text_of(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def alone(guides: InlineGuides, params: SamplingParams = GUIDED, prompt: list[int] = PROMPT) -> list[int]:
    mesh = GuidedMesh(guides, num_blocks=128)
    generate(mesh.a, "alone", prompt, params)
    mesh.run()
    tokens = mesh.a.tokens["alone"]
    mesh.close()
    return tokens


def go_on(engine: Engine, request_id: str, tokens: list[int], params: SamplingParams = GUIDED) -> None:
    """As a router does after a failover: the delivered tokens are part of the prompt."""
    message = wire.StartGenerate(
        engine.mesh.call(), request_id, 0, params, 60.0, num_output_tokens=len(tokens)
    )
    engine.core.actions.start_generate(ROUTER, message, [*PROMPT, *tokens], engine.mesh.now)


def test_the_output_is_one_of_the_grammar_and_ends_by_itself(
    guides: InlineGuides, text_of: Tokenizer
) -> None:
    for seed in range(6):
        tokens = alone(guides, msgspec.structs.replace(GUIDED, seed=seed))
        assert tokens[-1] in EOS
        value = json.loads(text_of.decode(tokens[:-1]))
        assert value["name"] in ("é日本😀", "ab") and len(value["ids"]) <= 3


@pytest.mark.slow
def test_another_engine_goes_on_behind_every_token_with_the_same_ones(
    guides: InlineGuides, text_of: Tokenizer
) -> None:
    """Also in the middle of a character, and between the last brace and the end."""
    seeds = (seed for seed in range(50))
    params = next(p for s in seeds if 0x65E5 in map(ord, said(guides, text_of, p := with_seed(s))))
    whole = alone(guides, params)
    cuts = [text_of.decode(whole[:k]) for k in range(len(whole))]
    assert any("\ufffd" in cut for cut in cuts), "some cut splits a character"
    assert cuts[-1].endswith("}")
    mesh = GuidedMesh(guides, num_blocks=256)
    for k in range(len(whole)):
        engine = mesh.b if k % 2 else mesh.a
        go_on(engine, f"r{k}", whole[:k], params)
        mesh.run()
        assert engine.tokens[f"r{k}"][k:] == whole[k:], k
        assert engine.finished[f"r{k}"].reason == "stop"
    mesh.close()


def with_seed(seed: int) -> SamplingParams:
    return msgspec.structs.replace(GUIDED, seed=seed)


def said(guides: InlineGuides, text_of: Tokenizer, params: SamplingParams) -> str:
    return str(text_of.decode(alone(guides, params)))


@pytest.mark.slow
def test_every_split_gives_the_same_tokens(guides: InlineGuides) -> None:
    whole = alone(guides)
    mesh = GuidedMesh(guides, num_blocks=128)
    for end in range(1, len(PROMPT) + 1):
        request_id = f"r{end}"
        for engine in (mesh.a, mesh.b):
            engine.core.memory.cache.clear()
        granted = grant_for(mesh.b, request_id, PROMPT, end)
        is_whole = end == len(PROMPT)
        receive(mesh.b, request_id, granted, end, GUIDED, await_first=is_whole)
        call = send(mesh.a, request_id, PROMPT, granted, 0, end, sampling=GUIDED if is_whole else None)
        mesh.run()
        tokens = mesh.b.tokens[request_id]
        if is_whole:
            sent = mesh.a.replies[call]
            assert isinstance(sent, wire.Sent) and sent.first_token is not None
            tokens = [sent.first_token, *tokens[1:]]
        assert tokens == whole, end
    mesh.close()


def test_rows_of_a_batch_have_masks_of_their_own_and_preemption_keeps_them(guides: InlineGuides) -> None:
    kinds = [
        PERSON,
        Grammar(kind="regex", text="[ab]{5,40}"),
        Grammar(kind="choice", text='["yes","no"]'),
        Grammar(kind="lark", text='start: ("x" | "yz")+ "."'),
        None,
    ]
    params = [
        msgspec.structs.replace(GUIDED, grammar=each, max_tokens=40, seed=k) for k, each in enumerate(kinds)
    ]
    expected = [alone(guides, one, prompt_of(9, k)) for k, one in enumerate(params)]
    mesh = GuidedMesh(guides, num_blocks=18)
    for k, one in enumerate(params):
        generate(mesh.a, f"r{k}", prompt_of(9, k), one)
    mesh.run()
    assert [mesh.a.tokens[f"r{k}"] for k in range(len(params))] == expected
    assert mesh.a.core.state.counters["preemptions"] > 0
    mesh.close()


def test_a_grammar_wins_over_min_tokens_and_ignore_eos(guides: InlineGuides, text_of: Tokenizer) -> None:
    grammar = schema({"type": "boolean"})
    for fields in ({"min_tokens": 64}, {"ignore_eos": True}, {"min_tokens": 64, "ignore_eos": True}):
        tokens = alone(guides, SamplingParams(max_tokens=80, temperature=0.0, grammar=grammar, **fields))
        assert text_of.decode(tokens[:-1]) in ("true", "false") and tokens[-1] in EOS
    many = SamplingParams(
        max_tokens=80, temperature=0.0, min_tokens=20, grammar=Grammar(kind="regex", text="[ab]*")
    )
    assert len(alone(guides, many)) > 20


def test_every_end_waits_until_the_grammar_may_end(guides: InlineGuides, tiny_model: Path) -> None:
    """Several ends, and one of the request's own: none is legal within an object, all are behind it."""
    params = msgspec.structs.replace(GUIDED, stop_token_ids=(7,))
    whole = alone(guides, params)
    guide = InlineGuides(compiler_for(tiny_model, VOCAB, EOS), VOCAB).prepare(params, [], EOS, print).guide
    assert guide is not None
    for k in range(len(whole)):
        mask = guide.allowed(whole[:k])
        assert [bool(mask[end // 32] >> end % 32 & 1) for end in (0, 7)] == [k == len(whole) - 1] * 2, k
    assert {at for at in range(VOCAB) if mask[at // 32] >> at % 32 & 1} == {0, 7}  # and nothing else


def test_a_grammar_may_begin_behind_given_tokens(guides: InlineGuides, text_of: Tokenizer) -> None:
    """What comes before is free, and cannot be the end; a failover in it changes nothing."""
    never = schema({"type": "boolean"}, after_token_ids=(9,) * 16)
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=3, grammar=never)
    after = tuple(alone(guides, params)[4:6])
    grammar = schema({"type": "boolean"}, after_token_ids=after)
    params = msgspec.structs.replace(params, grammar=grammar)
    whole = alone(guides, params)
    begin = next(k for k in range(2, 60) if tuple(whole[k - 2 : k]) == after)
    assert text_of.decode(whole[begin:-1]) in ("true", "false") and not EOS & {*whole[:-1]}
    mesh = GuidedMesh(guides, num_blocks=128)
    for k in range(len(whole)):
        go_on(mesh.b, f"r{k}", whole[:k], params)
        mesh.run()
        assert mesh.b.tokens[f"r{k}"][k:] == whole[k:]
    mesh.close()


def test_who_waits_for_a_guide_holds_nothing_and_can_be_aborted_and_run_out_of_time(tiny_model: Path) -> None:
    late = InlineGuides(compiler_for(tiny_model, VOCAB, EOS), VOCAB, is_late=True)
    mesh = GuidedMesh(late)
    granted = grant_for(mesh.b, "sent", PROMPT, len(PROMPT))
    receive(mesh.b, "sent", granted, len(PROMPT), GUIDED, await_first=True)
    send(mesh.a, "sent", PROMPT, granted, 0, len(PROMPT), sampling=GUIDED)
    for request_id in ("here", "gone", "old"):
        generate(mesh.a, request_id, PROMPT, GUIDED)
    generate(mesh.a, "free", PROMPT)
    mesh.run()
    assert "free" in mesh.a.finished, "nobody else waits"
    assert mesh.a.core.state.num_requests == 4 and not mesh.a.core.state.is_drained(mesh.now)
    mesh.a.core.actions.abort(ROUTER, wire.Abort(mesh.call(), "gone"), mesh.now)
    mesh.a.core.state.compiling[-1].deadline = mesh.now
    mesh.run()
    assert mesh.a.finished["old"].code == "deadline_exceeded"
    late.finish()
    mesh.run()
    assert mesh.a.finished["here"].reason == mesh.b.finished["sent"].reason == "stop"
    assert mesh.a.tokens["here"][1:] == mesh.b.tokens["sent"][1:]
    assert "gone" not in mesh.a.finished and late.made[3].is_cancelled
    mesh.close()


def test_an_early_start_gives_way_to_who_has_got_a_guide(tiny_model: Path, guides: InlineGuides) -> None:
    late = InlineGuides(compiler_for(tiny_model, VOCAB, EOS), VOCAB, is_late=True)
    mesh = GuidedMesh(late)
    granted = grant_for(mesh.b, "early", PROMPT, 9)
    receive(mesh.b, "early", granted, 9)
    send(mesh.a, "early", PROMPT, granted, 0, 9)
    generate(mesh.b, "guided", PROMPT, GUIDED)
    execute = mesh.a.runner.execute

    def interrupted(batch: Batch, on_layer: Callable[[int], None] | None = None) -> StepResult:
        def hook(layer: int) -> None:
            if layer == 1:  # the first layer has been put, the second not yet
                mesh.arrived = late.finish
                assert mesh.b.step()
            if on_layer is not None:
                on_layer(layer)

        return execute(batch, hook)

    mesh.a.runner.execute = interrupted  # type: ignore[method-assign]
    assert mesh.a.step()
    mesh.a.runner.execute = execute  # type: ignore[method-assign]
    assert mesh.b.core.state.counters["early_starts_put_back"] == 1
    mesh.run()
    assert mesh.b.tokens["guided"] == alone(guides)
    assert "early" in mesh.b.finished
    mesh.close()


class Flipping(Made):
    """Done at a look of its own: another thread may be so far at any moment."""

    looks = 0
    at = 0

    @property
    def is_done(self) -> bool:
        self.looks += 1
        return self.looks > self.at

    @is_done.setter
    def is_done(self, value: bool) -> None: ...


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize("is_bad", [False, True])
def test_a_guide_that_is_made_between_two_looks_is_taken(guides: InlineGuides, at: int, is_bad: bool) -> None:
    """Never a sequence without its guide, and never one that is said to be late because it was just made."""
    expected = alone(guides)

    class Racing(InlineGuides):
        def prepare(self, *asked: Any) -> Made:
            made = guides.prepare(*asked)
            flipping = Flipping(made.guide)
            flipping.at = at
            if is_bad:
                flipping.guide, flipping.error = None, InvalidRequest("it is none", field="grammar")
            return flipping

    mesh = GuidedMesh(Racing(guides._compiler, VOCAB))
    try:
        generate(mesh.a, "r", PROMPT, GUIDED)
        for _ in range(at + 1):
            mesh.run()
        if is_bad:
            assert mesh.a.finished["r"].detail == "it is none"
        else:
            assert mesh.a.tokens["r"] == expected
    except InvalidRequest as error:
        assert is_bad and error.detail == "it is none"
    finally:
        mesh.close()


@pytest.mark.parametrize("vocab_size", [320, 321, 352])
def test_a_mask_has_the_words_of_the_vocabulary(tiny_model: Path, vocab_size: int) -> None:
    guides = InlineGuides(compiler_for(tiny_model, vocab_size, EOS), vocab_size)
    made = guides.prepare(GUIDED, [], EOS, lambda: None)
    assert made.guide is not None
    assert len(made.guide.allowed([])) == len(full(vocab_size))


class Broken:
    """A matcher over which its library fails."""

    def mask(self) -> Mask:
        raise ValueError("a fault of the library")

    def may_end(self) -> bool:
        return False

    def take(self, token_id: int) -> None: ...

    def fork(self) -> Broken:
        return self


def test_a_fault_over_one_grammar_ends_its_own_request_only(guides: InlineGuides) -> None:
    mesh = GuidedMesh(guides)
    generate(mesh.a, "good", PROMPT, GUIDED)
    generate(mesh.a, "bad", PROMPT, GUIDED)
    bad = guides.made[-1].guide
    assert bad is not None
    bad._matcher = Broken()
    mesh.run()
    assert mesh.a.finished["bad"].code == "internal"
    assert mesh.a.finished["good"].reason == "stop"
    mesh.close()


def test_a_grammar_that_nothing_could_end_is_refused(tiny_model: Path) -> None:
    guides = InlineGuides(compiler_for(tiny_model, VOCAB, frozenset()), VOCAB)
    with pytest.raises(InvalidRequest, match="no end of sequence"):
        guides.prepare(GUIDED, [], frozenset(), lambda: None)
