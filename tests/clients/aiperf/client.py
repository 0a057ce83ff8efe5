"""``aiperf``: a load on its endpoint types; it has counted what it asked for, and read our metrics."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from checks import MESH, MESH_MODEL, MODEL_DIR, check, main

REQUESTS, OUTPUT_TOKENS = 10, 8
# Offline it takes no tokenizer from a folder; nobody answers it all the same.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
ENVIRONMENT["HF_ENDPOINT"] = "http://127.0.0.1:9"


def measure(endpoint: str) -> None:
    words = ["--model", MESH_MODEL, "--url", MESH, "--endpoint-type", endpoint, "--streaming"]
    words += ["--tokenizer", MODEL_DIR, "--use-server-token-count"]
    words += ["--request-count", str(REQUESTS), "--concurrency", "3", "--isl", "64"]
    words += ["--osl", str(OUTPUT_TOKENS), "--extra-inputs", "ignore_eos:true"]
    words += ["--ui", "none", "--output-artifact-dir", endpoint]
    subprocess.run([sys.executable, "-m", "aiperf", "profile", *words], env=ENVIRONMENT, check=True)
    report = json.loads(Path(endpoint, "profile_export_aiperf.json").read_text())
    assert report["is_complete"] and not report["error_summary"], report
    assert report["request_count"]["avg"] == REQUESTS
    if endpoint != "responses":  # there it counts nothing of answers that a bound has ended: ``incomplete``
        assert report["total_output_tokens"]["avg"] == REQUESTS * OUTPUT_TOKENS
    assert report["time_to_first_token"]["avg"] > 0
    metrics = json.loads(Path(endpoint, "server_metrics_export.json").read_text())
    assert metrics["summary"]["endpoints_successful"] == [f"{MESH}/metrics"]


@check("chat, streamed")
def chat() -> None:
    measure("chat")


@check("responses, streamed")
def responses() -> None:
    measure("responses")


@check("completions, streamed")
def completions() -> None:
    measure("completions")


if __name__ == "__main__":
    main()
