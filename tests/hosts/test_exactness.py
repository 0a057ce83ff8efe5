"""Every strategy between hosts gives the bits of a request that is alone, and nothing stays behind."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
from tokenizers import Tokenizer

from tests.support.hosts.mesh import HostMesh
from tests.support.hosts.world import World
from tests.support.process.bitwise import alone, crowd, differences, promise_of
from tests.support.process.cases import all_kinds, make_cases
from tests.support.process.exactness import PATIENT, SETTINGS, STRATEGIES

pytestmark = pytest.mark.timeout(300)


def test_every_strategy_gives_the_bits_of_a_request_alone(
    tiny_model: Path, logs: Path, world: World, vocab_size: int
) -> None:
    cases = all_kinds(make_cases(16, vocab_size=vocab_size, max_prompt=400, seed=15), vocab_size)
    with HostMesh(tiny_model, logs, world=world, settings=[*SETTINGS, *PATIENT]) as mesh:

        async def ask_all() -> list[str]:
            async with mesh.client() as client:
                reference = await alone(client, cases)
                assert promise_of(reference) is not None
                wrong = []
                for strategy in STRATEGIES:
                    got = await crowd(client, strategy, cases, salt=strategy)
                    wrong += [f"{strategy}: {each}" for each in differences(cases, reference, got)]
            await mesh.wait_whole()
            return wrong

        assert asyncio.run(ask_all()) == []


def test_a_client_of_the_gateway_gets_the_same_from_either_host(
    tiny_model: Path, logs: Path, world: World
) -> None:
    with HostMesh(tiny_model, logs, world=world, gateway=True) as mesh, world.front.inside.joined():
        body = {"model": "tiny", "prompt": "a long way from here " * 8, "max_tokens": 12, "temperature": 0.0}
        asyncio.run(_all_known(mesh))
        answers = [
            httpx.post(
                f"{mesh.gateway_url}/v1/completions",
                json=body,
                headers={"x-microserve-strategy": strategy},
                timeout=60.0,
            )
            for strategy in ("data_parallel", "disaggregated", "migrate", "balanced")
        ]
        assert {answer.status_code for answer in answers} == {200}
        texts = {answer.json()["choices"][0]["text"] for answer in answers}
        assert len(texts) == 1
        assert Tokenizer.from_file(str(tiny_model / "tokenizer.json")).encode(texts.pop()).ids


async def _all_known(mesh: HostMesh) -> None:
    async with mesh.client():
        pass
