"""The ``openai`` client, unmodified, against a whole mesh with the demo model."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam

from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

MODEL = "SmolLM2-135M-Instruct"
QUESTION: list[ChatCompletionMessageParam] = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def mesh(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MeshProcesses]:
    directory = tmp_path_factory.mktemp("openai")
    settings = [
        *(f"model.name={MODEL}", "kvcache.num_blocks=1024", "bus.stuck_s=60"),
        f"gateway.responses_path={directory / 'responses.db'}",
    ]
    with MeshProcesses(demo_model, directory, gateway=True, settings=settings) as mesh:
        url = f"http://127.0.0.1:{mesh.gateway_port}/ready"
        for _ in range(600):
            if httpx.get(url).status_code == 200 and httpx.get(url).json().get("engines", 2) >= 1:
                break
        yield mesh


@pytest.fixture(scope="module")
def client(mesh: MeshProcesses) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"http://127.0.0.1:{mesh.gateway_port}/v1", api_key="none", timeout=120.0, max_retries=0
    ) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


@pytest.mark.parametrize(
    "strategy", ["data_parallel", "disaggregated", "balanced", "cache_aware", "migrate", "auto"]
)
def test_a_streamed_answer_is_the_same_under_every_strategy(client: openai.OpenAI, strategy: str) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0.0,
        max_tokens=12,
        stream=True,
        stream_options={"include_usage": True},
        extra_headers={"x-microserve-strategy": strategy},
    )
    text, usage, reason = "", None, None
    for chunk in stream:
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
        usage = chunk.usage or usage

    assert text.startswith("The capital of France is Paris.")
    assert reason in ("stop", "length")
    assert usage is not None and usage.prompt_tokens > 30 and 0 < usage.completion_tokens <= 12


def test_a_conversation_by_responses(client: openai.OpenAI) -> None:
    """Streamed, kept, and gone on from."""
    asked = "What is the capital of France?"
    with client.responses.stream(model=MODEL, input=asked, temperature=0.0, max_output_tokens=12) as stream:
        events = list(stream)
    last = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    assert last.response.output_text.startswith("The capital of France is Paris.")
    again = client.responses.create(
        model=MODEL,
        input="Thanks.",
        previous_response_id=last.response.id,
        temperature=0.0,
        max_output_tokens=4,
    )
    assert last.response.usage is not None and again.usage is not None
    assert again.usage.input_tokens > last.response.usage.total_tokens
    assert client.responses.retrieve(again.id).output == again.output


def test_a_whole_answer_with_logprobs_and_choices(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        temperature=0.0,
        max_completion_tokens=8,
        n=2,
        logprobs=True,
        top_logprobs=2,
    )
    texts = [choice.message.content for choice in answer.choices]
    assert len(texts) == 2 and texts[0] == texts[1]
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    # The end-of-sequence token counts, and has no text.
    assert answer.usage is not None and len(logprobs.content) * 2 >= answer.usage.completion_tokens - 2
    for entry in logprobs.content:
        assert entry.logprob <= 0.0
        assert entry.token == entry.top_logprobs[0].token  # greedy


def test_a_completion_with_a_stop_string(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="1, 2, 3, 4,", max_tokens=30, temperature=0.0, stop=["8"]
    )
    assert answer.choices[0].finish_reason == "stop"
    assert "8" not in answer.choices[0].text
    assert "5" in answer.choices[0].text


def test_sampling_with_a_seed_repeats(client: openai.OpenAI) -> None:
    texts = {
        client.completions.create(
            model=MODEL,
            prompt="Once upon a time",
            max_tokens=12,
            temperature=1.0,
            seed=11,
            extra_headers={"x-microserve-strategy": strategy},
        )
        .choices[0]
        .text
        for strategy in ("data_parallel", "disaggregated", "balanced")
    }
    assert len(texts) == 1


def test_errors_say_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nobody", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as wrong:
        client.completions.create(model=MODEL, prompt="x", temperature=-1.0)
    assert wrong.value.param == "temperature"
    with pytest.raises(openai.BadRequestError, match="maximum context length is 8192 tokens") as long:
        client.completions.create(model=MODEL, prompt=[5] * 9000)
    assert long.value.code == "context_length_exceeded"


def test_the_canonical_line_adds_up(client: openai.OpenAI, mesh: MeshProcesses) -> None:
    client.completions.create(model=MODEL, prompt="One more", max_tokens=3)
    lines = [e for e in mesh.events("gateway") if e["event"] == "request.finished" and "wall_s" in e]
    assert lines
    phases = [
        "queued_s",
        "tokenised_s",
        "routed_s",
        "granted_s",
        "prefilled_s",
        "transferred_s",
        "admitted_s",
        "first_token_s",
        "decoded_s",
    ]
    for line in lines:
        if all(name in line for name in phases):
            total = sum(float(str(line[name])) for name in phases)
            assert abs(total - float(str(line["wall_s"]))) < 1e-5, line
    assert any(all(name in line for name in phases) for line in lines)
