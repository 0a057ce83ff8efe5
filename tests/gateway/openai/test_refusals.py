"""What the gateway refuses by itself: unknown routes, missing keys, always as an OpenAI envelope."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from tests.support.gateway.gateway_world import GatewayWorld, gateway_world, run


def http_of(world: GatewayWorld, **options: Any) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0, **options)


ENVELOPES = [
    ("GET", "/nothing", 404, "not_found"),
    ("GET", "/v1/nothing", 404, "not_found"),
    ("GET", "/health/", 404, "not_found"),
    ("GET", "/v1/chat/completions", 405, "method_not_allowed"),
    ("DELETE", "/health", 405, "method_not_allowed"),
    # A client repeats what a 5xx answers; what is not here will not be here the third time either.
    ("POST", "/v1/embeddings", 404, "not_found"),
    ("POST", "/v1/audio/speech", 404, "not_found"),
    ("POST", "/flush_cache", 404, "not_offered"),
    ("GET", "/flush_cache", 404, "not_offered"),
    ("POST", "/server_info", 405, "method_not_allowed"),
    ("POST", "/tokenize", 400, "invalid_request"),
    ("POST", "/detokenize", 400, "invalid_request"),
]


def test_every_refusal_is_an_envelope(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            for method, path, status, code in ENVELOPES:
                reply = await http.request(method, path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (status, code)
                assert reply.headers["x-request-id"]

    run(main())


def test_keys_cover_everything_but_probes(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, 'gateway.api_keys=["secret"]') as world, http_of(world) as http:
            for path in ("/health", "/ready"):
                assert (await http.get(path)).status_code == 200
            for path in ("/v1/models", "/metrics", "/version", "/nothing"):
                reply = await http.get(path)
                assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key")
                assert reply.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/chat/completions", "/v1/completions", "/tokenize"):
                assert (await http.post(path, content=b"{")).status_code == 401
            with_key = {"authorization": "Bearer secret"}
            assert (await http.get("/v1/models", headers=with_key)).status_code == 200

    run(main())
