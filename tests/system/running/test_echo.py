"""Multiple choice as ``lm-eval`` asks for it, of a whole mesh: its numbers are those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

CONTEXT = [5, 17, 300, 42, 8, 99, 100, 7, 12, 250, 33, 64, 5, 17, 300, 42, 8, 3]
CONTINUATIONS = [[11, 12, 13], [200], [42, 8, 99, 100]]


def judged(choice: dict[str, Any], context_len: int) -> tuple[float, bool]:
    """Sum of a continuation's log-probabilities, and whether each of its tokens was the likeliest."""
    told = choice["logprobs"]
    values, tops = told["token_logprobs"][context_len:-1], told["top_logprobs"][context_len:-1]
    return sum(values), all(value == max(top.values()) for value, top in zip(values, tops, strict=True))


def test_continuations_are_weighed_as_by_transformers(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        likeliest = int(model(torch.tensor([CONTEXT])).logits[0, -1].argmax())
    prompts = [CONTEXT + continuation for continuation in (*CONTINUATIONS, [likeliest])]
    body = {"prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    settings = ["model.name=tiny", "model.dtype=float32", "router.default_strategy=disaggregated"]
    with MeshProcesses(tiny_model, tmp_path, gateway=True, settings=settings) as mesh:
        replies = [
            httpx.post(
                f"http://127.0.0.1:{mesh.gateway_port}/v1/completions",
                json={"model": "tiny", **body},
                headers={"x-microserve-strategy": strategy},
                timeout=60.0,
            ).raise_for_status()
            for strategy in ("disaggregated", "balanced", "data_parallel")
        ]
    answers = [sorted(reply.json()["choices"], key=lambda choice: choice["index"]) for reply in replies]

    assert [choice["logprobs"] for choice in answers[0]] == [choice["logprobs"] for choice in answers[1]]
    assert answers[1] == answers[2], "whatever the strategy, and however warm the cache is"
    for prompt, choice in zip(prompts, answers[0], strict=True):
        with torch.inference_mode():
            logprobs = torch.log_softmax(model(torch.tensor([prompt])).logits[0].float(), -1)
        wanted = sum(logprobs[at - 1, prompt[at]].item() for at in range(len(CONTEXT), len(prompt)))
        is_greedy = all(
            int(logprobs[at - 1].argmax()) == prompt[at] for at in range(len(CONTEXT), len(prompt))
        )
        total, seems_greedy = judged(choice, len(CONTEXT))
        assert total == pytest.approx(wanted, abs=1e-3) and seems_greedy == is_greedy
        assert len(choice["logprobs"]["tokens"]) == len(prompt) + 1
    assert judged(answers[0][-1], len(CONTEXT))[1]
