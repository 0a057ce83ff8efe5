"""``lm-eval``: its models for servers, on tasks that are files here (``tasks/``)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import lm_eval
from checks import MESH, MESH_MODEL, MODEL_DIR, TALKER, TALKER_MODEL, check, main
from lm_eval.tasks import TaskManager

TASKS = Path(__file__).with_name("tasks")


def evaluate(model: str, task: str, arguments: dict[str, Any], **more: Any) -> dict[str, Any]:
    """The task's figures."""
    os.chdir(TASKS)  # where their files are
    tasks = TaskManager(include_path=str(TASKS), include_defaults=False)
    report = lm_eval.simple_evaluate(
        model=model, model_args=arguments, tasks=[task], task_manager=tasks, bootstrap_iters=0, **more
    )
    figures: dict[str, Any] = report["results"][task]
    return figures


@check("local-chat-completions: generate_until")
def chat() -> None:
    arguments = {"model": TALKER_MODEL, "base_url": f"{TALKER}/v1/chat/completions", "num_concurrent": 2}
    figures = evaluate("local-chat-completions", "said", arguments, apply_chat_template=True)
    assert figures["exact_match,none"] == 1.0, figures


def on_mesh(**more: Any) -> dict[str, Any]:
    return {"model": MESH_MODEL, "base_url": f"{MESH}/v1/completions", "tokenizer": MODEL_DIR, **more}


@check("local-completions: a loglikelihood task, alone and in batches")
def loglikelihood() -> None:
    alone, together = [
        evaluate("local-completions", "likely", on_mesh(tokenizer_backend="huggingface"), batch_size=size)
        for size in (1, 3)
    ]
    assert alone["perplexity,none"] == together["perplexity,none"] > 1.0, (alone, together)
    assert 0.0 <= alone["acc,none"] < 1.0


@check("local-completions: a multiple-choice task")
def multiple_choice() -> None:
    figures = evaluate("local-completions", "chosen", on_mesh(num_concurrent=3))
    assert figures["acc,none"] == 1.0, figures


if __name__ == "__main__":
    main()
