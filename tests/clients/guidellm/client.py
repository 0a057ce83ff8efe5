"""``guidellm``: a load on each of its request formats; it has counted what it asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from checks import MESH, MESH_MODEL, MODEL_DIR, check, main

REQUESTS, OUTPUT_TOKENS = 10, 8


def measure(request_format: str) -> Any:
    report = Path(f"{request_format.strip('/').replace('/', '-')}.json")
    words = [
        "--backend",
        f"kind=openai_http,target={MESH},model={MESH_MODEL},request_format={request_format}",
    ]
    words += ["--profile", "kind=concurrent,streams=3"]
    words += ["--constraint", f"kind=max_requests,count={REQUESTS}"]
    words += ["--tokenizer", f"kind=huggingface_auto,model={MODEL_DIR}"]
    words += ["--data", f"kind=synthetic_text,prompt_tokens=64,output_tokens={OUTPUT_TOKENS}"]
    words += ["--output", f"kind=json,path={report}", "--disable-console"]
    subprocess.run([sys.executable, "-m", "guidellm", "run", *words], check=True)
    [benchmark] = json.loads(report.read_text())["benchmarks"]
    return benchmark["requests"]


def is_right(requests: Any) -> None:
    assert not requests["errored"] and not requests["incomplete"], requests
    assert len(requests["successful"]) == REQUESTS
    for each in requests["successful"]:
        assert each["output_tokens"] == OUTPUT_TOKENS and each["prompt_tokens"] >= 64
        assert each["time_to_first_token_ms"] > 0


@check("/v1/chat/completions, streamed")
def chat() -> None:
    is_right(measure("/v1/chat/completions"))


@check("/v1/responses, streamed")
def responses() -> None:
    is_right(measure("/v1/responses"))


@check("/v1/completions, streamed")
def completions() -> None:
    is_right(measure("/v1/completions"))


if __name__ == "__main__":
    main()
