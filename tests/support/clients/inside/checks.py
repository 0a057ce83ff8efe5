"""What clients' scripts have in common. It runs in a client's own environment: the standard library alone."""

from __future__ import annotations

import asyncio
import inspect
import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

MESH = os.environ["MICROSERVE_MESH"]
"""Base address of a whole mesh. Its model's words have no sense, and fit what is asked of them."""
MESH_MODEL = "leaning"
TALKER = os.environ["MICROSERVE_TALKER"]
"""Base address of a gateway that answers ``say: TEXT`` by TEXT, and a tool's result by ``The tool said``."""
TALKER_MODEL = "talker"
MODEL_DIR = os.environ["MICROSERVE_MODEL_DIR"]
"""The tokenizer of both."""
CHECKS: list[tuple[str, Callable[[], Any]]] = []


def check(name: str) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """``name``: what is tried, as docs/clients.md says it."""

    def add(function: Callable[[], Any]) -> Callable[[], Any]:
        CHECKS.append((name, function))
        return function

    return add


def call_text(name: str, /, **arguments: Any) -> str:
    """A call as the model writes it."""
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def main() -> None:
    """All of them; one that fails does not hide the next."""
    failed = 0
    for name, function in CHECKS:
        try:
            result = function()
            if inspect.iscoroutine(result):
                asyncio.run(result)
        except Exception:
            failed += 1
            print(f"FAILED {name}\n{traceback.format_exc()}", flush=True)
        else:
            print(f"ok {name}", flush=True)
    sys.exit(1 if failed else 0)
