"""What is refused on the paths of the Messages API, by whatever part of the gateway: Anthropic's envelope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.support.gateway.gateway_world import gateway_world, run

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 4, "messages": [{"role": "user", "content": "hi"}]}
MESSAGES = "/v1/messages"


def told(reply: httpx.Response) -> tuple[int, str]:
    """Status and type; that the envelope and the id are where Anthropic's clients look for them."""
    body = reply.json()
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    assert set(body["error"]) == {"type", "message", "param", "code"}
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    return reply.status_code, body["error"]["type"]


def test_refusals_without_keys(model: Path) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, "gateway.max_body_mb=1") as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            invalid = (400, "invalid_request_error")
            assert told(await http.post(MESSAGES, content=b"{")) == invalid
            assert told(await http.post(MESSAGES, json={})) == invalid
            assert told(await http.post(MESSAGES, json={**BODY, "temperature": -1})) == invalid
            assert told(await http.post(MESSAGES, json={**BODY, "model": "x"})) == (404, "not_found_error")
            assert told(await http.post(f"{MESSAGES}/count_tokens", json={})) == invalid
            assert told(await http.post(f"{MESSAGES}/batches", json={})) == (404, "not_found_error")
            reply = await http.get(MESSAGES)
            assert told(reply) == (405, "invalid_request_error")
            assert reply.headers["allow"] == "POST, OPTIONS"
            large = {**BODY, "system": "x" * (1 << 20)}
            assert told(await http.post(MESSAGES, json=large)) == (413, "request_too_large")
            # The paths of other APIs have theirs.
            reply = await http.post("/v1/messages2", json={})
            assert (reply.status_code, set(reply.json())) == (404, {"error"})
            assert "request-id" not in reply.headers

    run(main())


def test_keys_and_their_limits(model: Path) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, 'gateway.api_keys=["secret"]') as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = lambda served: served.end("stop")
            assert told(await http.post(MESSAGES, json=BODY)) == (401, "authentication_error")
            wrong = {"x-api-key": "wrong"}
            assert told(await http.post(MESSAGES, json=BODY, headers=wrong)) == (401, "authentication_error")
            for right in ({"x-api-key": "secret"}, {"authorization": "Bearer secret"}):
                assert (await http.post(MESSAGES, json=BODY, headers=right)).status_code == 200

    run(main())


def test_nobody_is_there_to_serve(model: Path) -> None:
    async def main() -> None:
        async with (
            gateway_world(model, num_engines=0) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            reply = await http.post(MESSAGES, json=BODY)
            assert told(reply) == (529, "overloaded_error")
            assert int(reply.headers["retry-after"]) >= 1

    run(main())
