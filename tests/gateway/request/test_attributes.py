"""What a gateway lets strategies know of who asks: by its allow-list, bounded, private where that is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from microserve.gateway.request.attributes import Attributes
from microserve.gateway.request.request import GenerateRequest, Texts
from microserve.protocol import log
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.protocol.messages.request.attributes import MAX_ATTRIBUTES, MAX_VALUE_CHARS
from microserve.protocol.settings.gateway import GatewaySettings
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run

BODY = {"model": "tiny", "prompt": "a b", "max_tokens": 4}
ALL = '["user", "metadata", "header.x-tier"]'


def answer(served: Served) -> None:
    served.send([5, 6])
    served.end("length")


@pytest.mark.parametrize(
    ("settings", "body", "headers", "seen"),
    [
        ((), {"user": "u", "prompt_cache_key": "k", "metadata": {"a": "b"}}, {"x-tier": "gold"},
         {"user": "u", "prompt_cache_key": "k"}),
        ((f"gateway.attributes={ALL}", 'gateway.private_attributes=["metadata"]'),
         {"user": "u", "prompt_cache_key": "k", "metadata": {"a": "b", "c": "d"}}, {"X-Tier": "gold"},
         {"user": "u", "metadata.a": "b", "metadata.c": "d", "header.x-tier": "gold"}),
        (('gateway.attributes=["metadata.a"]', "gateway.private_attributes=[]"),
         {"user": 7, "metadata": {"a": "b", "c": "d", "e": 8}}, {}, {"metadata.a": "b"}),
        (("gateway.attributes=[]", "gateway.private_attributes=[]"),
         {"user": "u" * 1000, "metadata": 7}, {"x-tier": "gold"}, {}),
        ((), {"user": None, "n": 2}, {}, {}),
    ],
)  # fmt: skip
def test_strategies_are_told_what_the_operator_lets_through(
    model: Path,
    settings: tuple[str, ...],
    body: dict[str, Any],
    headers: dict[str, str],
    seen: dict[str, str],
) -> None:
    async def main(world: GatewayWorld, http: httpx.AsyncClient) -> None:
        with capture_logs() as lines:
            reply = await http.post("/v1/completions", json={**BODY, **body}, headers=headers)
        assert reply.status_code == 200, reply.text
        assert {str(served.message.attributes) for served in world.router.served.values()} == {str(seen)}
        told = [line["attributes"] for line in lines if line["event"] == log.REQUEST_FINISHED]
        private = ("user", "prompt_cache_key") if not settings else ("metadata.c",)
        for each in told:
            assert each.keys() == seen.keys()
            assert all(value == seen[name] or value is None for name, value in each.items())
            assert all(each[name] is None for name in private if name in each)

    run(served(model, settings, main))


async def served(model: Path, settings: tuple[str, ...], main: Any) -> None:
    async with (
        gateway_world(model, *settings) as world,
        httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
    ):
        world.router.answer = answer
        await main(world, http)


@pytest.mark.parametrize(
    ("body", "headers", "field"),
    [
        ({"user": 7}, {}, "user"),
        ({"user": "u" * (MAX_VALUE_CHARS + 1)}, {}, "user"),
        ({"metadata": "m"}, {}, "metadata"),
        ({"metadata": {"a": 7}}, {}, "metadata.a"),
        ({"metadata": {"k" * 80: "v"}}, {}, "metadata"),
        ({"metadata": {str(number): "v" for number in range(MAX_ATTRIBUTES + 1)}}, {}, "metadata"),
        ({}, {"x-tier": "t" * (MAX_VALUE_CHARS + 1)}, "x-tier"),
    ],
)
def test_what_is_none_is_refused_by_name(
    model: Path, body: dict[str, Any], headers: dict[str, str], field: str
) -> None:
    async def main(world: GatewayWorld, http: httpx.AsyncClient) -> None:
        reply = await http.post("/v1/completions", json={**BODY, **body}, headers=headers)
        assert (reply.status_code, reply.json()["error"]["param"]) == (400, field)
        assert not world.router.served
        assert (await http.post("/v1/completions", json=BODY)).status_code == 200

    run(served(model, (f"gateway.attributes={ALL}", "gateway.private_attributes=[]"), main))


@pytest.mark.parametrize(
    ("allowed", "private", "what"),
    [
        (["prompt"], [], "'prompt' is none of user, prompt_cache_key"),
        (["metadata."], [], ""),
        (["user"], GatewaySettings().private_attributes, ""),
        (["metadata." + "k" * 80], [], "is none of"),
        (["header.X-Tier"], [], "lower case"),
        (["header.authorization"], [], "is a secret of the client's"),
        (["header.cookie"], [], "is a secret of the client's"),
        ([f"header.x-{number}" for number in range(17)], [], "17 of them, at most 16"),
        (["user"], ["metadata"], "'metadata' is not in gateway.attributes"),
    ],
)
def test_an_allow_list_that_is_none_stops_the_start(
    allowed: list[str], private: list[str], what: str
) -> None:
    if not what:
        Attributes.of(allowed, private)
        return
    with pytest.raises(ConfigError, match=what) as raised:
        Attributes.of(allowed, private)
    assert raised.value.field == f"gateway.{'private_' if private else ''}attributes"


def test_private_values_are_told_to_strategies_alone() -> None:
    attributes = Attributes.of(["user", "metadata", "header.x-a"], ["user", "metadata.secret"])
    told = attributes.told({"user": "u", "metadata.secret": "s", "metadata.team": "t", "header.x-a": "a"})
    assert told == {"user": None, "metadata.secret": None, "metadata.team": "t", "header.x-a": "a"}


def test_bounds_of_a_request_are_those_of_the_wire() -> None:
    with pytest.raises(InvalidRequest):
        Attributes.of(["user"]).read(labelled(user="u" * (MAX_VALUE_CHARS + 1)), _NoHeaders())


def test_a_label_is_named_as_the_client_named_it() -> None:
    request = labelled(user=7)
    request.names["user"] = "metadata.user_id"
    with pytest.raises(InvalidRequest, match=r"metadata\.user_id must be a text") as caught:
        Attributes.of(["user"]).read(request, _NoHeaders())
    assert caught.value.field == "metadata.user_id"


def labelled(**labels: Any) -> GenerateRequest:
    return GenerateRequest(model="m", prompt=Texts(["x"]), labels=labels)


class _NoHeaders:
    def text_header(self, name: bytes) -> str | None:
        return None
