"""``top`` before a gateway of ours: what it reads is what there is, and whose key is missing is said."""

from __future__ import annotations

import asyncio
import hashlib
import time
from pathlib import Path

import httpx
import pytest

from microserve.gateway.view.forms import RequestDetail
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.top.link import Link, Unseen
from microserve.services.command.top.picture import Picture
from microserve.services.command.top.story import request_lines
from tests.support.gateway.gateway_world import GatewayWorld, gateway_world, make_model, run


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


async def ask(world: GatewayWorld, name: str) -> None:
    """One request, served."""
    async with httpx.AsyncClient(base_url=world.address) as http:
        body = {"model": "tiny", "prompt": "hello mesh", "max_tokens": 4}
        answer = asyncio.create_task(http.post("/v1/completions", json=body, headers={"x-request-id": name}))
        served = await world.router.request()
        served.send([7] * 4)
        served.end()
        assert (await answer).status_code == 200


def test_the_feed_and_the_paths_tell_of_a_request(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            link, picture, lost = Link(Endpoint.at(world.address)), Picture(), list[str]()
            follow = asyncio.create_task(
                link.follow(lambda event: picture.take(event, time.monotonic()), lost.append)
            )
            while not picture.at:
                await asyncio.sleep(0.01)
            await ask(world, "mine")
            while not picture.requests() or not picture.requests()[0].at:
                await asyncio.sleep(0.01)
            [form] = picture.requests()
            assert (form.http_id, form.output_tokens, lost) == ("mine", 4, [])
            assert picture.summary(time.monotonic()).tokens_per_s > 0.0
            told = request_lines(await link.get(f"requests/{form.id}", RequestDetail))
            [whole] = [line for line in told if line.startswith("  = wall")]
            assert whole.split() == ["=", "wall", f"{form.wall_s * 1000:.1f}", "ms"]
            once = Picture()
            await link.look(once, time.monotonic)
            assert [each.id for each in once.requests()] == [form.id]
            assert once.health is not None
            assert [alarm.name for alarm in once.health.alarms] == ["index.silent"]
            follow.cancel()
            await asyncio.wait([follow])
            await link.close()

    run(main())


@pytest.mark.parametrize(
    ("key", "said"),
    [("", "asks for an API key"), ("sk-no", "does not know this key"), ("sk-plain", "is for operators")],
)
def test_whose_key_is_missing_is_said(model: Path, tmp_path: Path, key: str, said: str) -> None:
    file = tmp_path / "keys.toml"
    file.write_text(f'[keys.a]\nsha256 = ["{hashlib.sha256(b"sk-plain").hexdigest()}"]\n')

    async def main() -> None:
        async with gateway_world(model, f"gateway.api_keys_file={file}") as world:
            link = Link(Endpoint.at(world.address, key))
            with pytest.raises(Unseen, match=said):
                await link.look(Picture(), time.monotonic)
            await link.close()

    run(main())
