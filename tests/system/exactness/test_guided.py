"""Constrained answers on real processes: bits of a request alone under any strategy, also behind a kill -9,
and over HTTP what a client asked for."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.process.bitwise import ask_alone, check_bits
from tests.support.process.cases import make_cases, with_calls, with_grammars, with_logprobs
from tests.support.process.exactness import PATIENT, SETTINGS
from tests.support.process.processes import MeshProcesses

pytestmark = [pytest.mark.system, pytest.mark.timeout(400)]

STRATEGIES = ["disaggregated", "balanced", "migrate"]
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}


def test_bits_of_constrained_answers(tiny_model: Path, tmp_path: Path) -> None:
    config = json.loads((tiny_model / "config.json").read_text())
    plain = make_cases(20, vocab_size=config["vocab_size"], max_prompt=200, seed=5)
    cases = with_logprobs([*with_grammars(plain), *with_calls(plain[:10], config["vocab_size"] // 2)])
    settings = [*SETTINGS, *PATIENT, "model.dtype=bfloat16"]
    with MeshProcesses(tiny_model, tmp_path, settings=settings) as mesh:
        promise, reference = asyncio.run(ask_alone(mesh.router_address, cases))
        assert promise is not None
        assert {answer.reason for answer in reference} == {"stop", "length"}
        assert asyncio.run(check_bits(mesh, cases, reference, STRATEGIES, {"kill -9": ["balanced"]})) == 0


def test_a_client_gets_what_it_asked_for(tiny_model: Path, tmp_path: Path) -> None:
    async def ask(http: httpx.AsyncClient, **fields: Any) -> list[str]:
        # The longest value, with all the blanks that are legal, ends within these.
        reply = await http.post(
            "/v1/completions", json={"model": "tiny", "prompt": "Once", "max_tokens": 400, **fields}
        )
        assert reply.status_code == 200, reply.text
        choices = reply.json()["choices"]
        assert {choice["finish_reason"] for choice in choices} == {"stop"}
        return [choice["text"] for choice in choices]

    async def main(port: int) -> None:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=120.0) as http:
            wish = {"type": "json_schema", "json_schema": {"name": "pet", "schema": SCHEMA, "strict": True}}
            for fields in ({"n": 4}, {"temperature": 0}, {"min_tokens": 80}, {"ignore_eos": True}):
                for text in await ask(http, response_format=wish, **fields):
                    pet = json.loads(text)
                    assert set(pet) == {"name", "age", "kind"} and pet["kind"] in ("cat", "dog")
                    assert len(pet["name"]) <= 12 and 0 <= pet["age"] <= 150
            assert set(await ask(http, guided_choice=["yes", "日本"], n=4)) <= {"yes", "日本"}
            for text in await ask(http, structured_outputs={"regex": "[0-9]{4}-[0-9][0-9]"}, n=2):
                assert re.fullmatch("[0-9]{4}-[0-9][0-9]", text)
            [text] = await ask(http, structured_outputs={"json": {"type": "boolean"}}, logit_bias={"2": 100})
            assert text in ("true", "false"), "an end that is wanted is not legal before the value is whole"
            reply = await http.post(
                "/v1/completions",
                json={"model": "tiny", "prompt": "x", "guided_json": {"properties": {"a": {"not": {}}}}},
            )
            assert reply.status_code == 400 and "not at #/properties/a" in reply.json()["error"]["message"]

    with MeshProcesses(tiny_model, tmp_path, gateway=True, settings=["model.name=tiny"]) as mesh:
        asyncio.run(main(mesh.gateway_port))
