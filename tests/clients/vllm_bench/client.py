"""``vllm bench serve``, as the package for CPUs has it: its command looks for a package of another name."""

from __future__ import annotations

from typing import Any

from checks import MESH, MESH_MODEL, MODEL_DIR, check, main
from vllm.benchmarks.serve import add_cli_args
from vllm.benchmarks.serve import main as bench_serve
from vllm.utils.argparse_utils import FlexibleArgumentParser

REQUESTS, OUTPUT_TOKENS = 10, 8


def measure(backend: str, endpoint: str, *more: str) -> None:
    parser = FlexibleArgumentParser()
    add_cli_args(parser)
    words = ["--backend", backend, "--endpoint", endpoint, "--base-url", MESH, *more]
    words += ["--model", MESH_MODEL, "--tokenizer", MODEL_DIR, "--dataset-name", "random"]
    words += ["--random-input-len", "64", "--random-output-len", str(OUTPUT_TOKENS), "--ignore-eos"]
    words += ["--num-prompts", str(REQUESTS), "--max-concurrency", "3", "--ready-check-timeout-sec", "30"]
    report: dict[str, Any] = bench_serve(parser.parse_args(words))
    assert (report["completed"], report["failed"]) == (REQUESTS, 0), report
    assert report["total_output_tokens"] == REQUESTS * OUTPUT_TOKENS
    assert report["mean_ttft_ms"] > 0


@check("openai-chat")
def chat() -> None:
    measure("openai-chat", "/v1/chat/completions")


@check("openai, log-probabilities")
def completions() -> None:
    measure("openai", "/v1/completions")
    measure("openai", "/v1/completions", "--logprobs", "2")


if __name__ == "__main__":
    main()
