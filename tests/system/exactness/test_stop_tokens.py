"""A stop token is never text, by whichever engine it was made and whoever was lost behind it."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(240)]

STRATEGIES = ["disaggregated", "elastic_roles", "conditional"]
NUM_PROMPTS = 85


async def ask(http: httpx.AsyncClient, strategy: str, prompt: list[int], **body: Any) -> dict[str, Any]:
    reply = await http.post(
        "/v1/completions",
        json={"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0, **body},
        headers={"x-microserve-strategy": strategy},
    )
    assert reply.status_code == 200, reply.text
    choice: dict[str, Any] = reply.json()["choices"][0]
    return choice


def test_the_first_token_is_the_end(tiny_model: Path, tmp_path: Path) -> None:
    """It comes from the engine that prefills; that it was the end is said by the one that decodes."""
    vocabulary = json.loads((tiny_model / "tokenizer.json").read_text())["model"]["vocab"]
    dice = random.Random(4)
    prompts = [[dice.randrange(3, 300) for _ in range(dice.randrange(20, 90))] for _ in range(NUM_PROMPTS)]

    async def main(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60.0) as http:
            firsts = [await ask(http, "data_parallel", each, logprobs=0, ignore_eos=True) for each in prompts]
            # By name: of a byte-level vocabulary of single bytes it is the token.
            ids = [_id_of(first["logprobs"]["tokens"][0], vocabulary) for first in firsts]
            cases = [(prompt, stop) for prompt, stop in zip(prompts, ids, strict=True) if stop is not None]
            assert len(cases) >= 40  # 120 answers
            for strategy in STRATEGIES:
                asked = [ask(http, strategy, prompt, stop_token_ids=[stop]) for prompt, stop in cases]
                for choice in await asyncio.gather(*asked):
                    assert (choice["text"], choice["finish_reason"]) == ("", "stop"), strategy

    with MeshProcesses(tiny_model, tmp_path, gateway=True, settings=["model.name=tiny"]) as mesh:
        asyncio.run(main(mesh.gateway_port))


def _id_of(name: str, vocabulary: dict[str, int]) -> int | None:
    """Of a printable token; None of others."""
    return vocabulary.get(name.replace(" ", "Ġ")) if name.isascii() and name.isprintable() else None
