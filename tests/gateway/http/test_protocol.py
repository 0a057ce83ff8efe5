"""HTTP as clients really speak it: upgrades that nobody asked to follow, preflights, methods, pipelines."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import pytest

from microserve.gateway.http.cors import with_cors
from microserve.protocol.errors import ConfigError
from tests.support.gateway.gateway_world import Connection, GatewayWorld, connect, gateway_world, run

BODY = b'{"model":"tiny","prompt":"x"}'
H2C = b"connection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQCAAAAAAIAAAAA\r\n"
WEBSOCKET = b"connection: keep-alive, upgrade\r\nupgrade: websocket\r\nsec-websocket-key: x\r\n"


def http_of(world: GatewayWorld) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=world.address, timeout=20.0)


def test_who_comes_after_a_rest_is_told_the_date_of_now(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody keeps the date while nobody is connected."""
    now = [1_000_000_000.0]
    monkeypatch.setattr("microserve.gateway.http.server.DATE_S", 0.005)
    monkeypatch.setattr("uvicorn.server.time.time", lambda: now[0])

    async def main() -> None:
        async with gateway_world(model) as world:
            dates = []
            for _ in range(3):
                async with connect(world) as client:
                    await client.send(b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n")
                    _, headers, _ = await answer(client)
                    dates.append(headers["date"][:11])
                await asyncio.sleep(0.05)
                now[0] += 86_400.0
            assert dates == ["sun, 09 sep", "mon, 10 sep", "tue, 11 sep"]

    run(main())


def request(extra: bytes = b"", *, path: bytes = b"/v1/completions", body: bytes = BODY) -> bytes:
    length = b"content-length: %d\r\n" % len(body)
    return b"POST %b HTTP/1.1\r\nhost: t\r\n%b%b\r\n%b" % (path, extra, length, body)


async def answer(client: Connection) -> tuple[int, dict[str, str], bytes]:
    status, headers = await client.head()
    return status, headers, await client.reader.readexactly(int(headers.get("content-length", "0")))


@pytest.mark.parametrize("upgrade", [H2C, WEBSOCKET, b"connection: UPGRADE\r\nupgrade: foo/2\r\n"])
def test_an_upgrade_that_is_not_followed_changes_nothing(model: Path, upgrade: bytes) -> None:
    """RFC 9110 7.8; Java's client sends h2c with its first request. However the bytes are cut."""

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.end("length")
            whole = request(upgrade)
            chunked = b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
            for data in (
                [whole],
                [whole[:-9], whole[-9:]],
                [whole[: -len(BODY)], whole[-len(BODY) :]],
                [whole[i : i + 7] for i in range(0, len(whole), 7)],
                [request(upgrade + b"transfer-encoding: chunked\r\n", body=b"").replace(
                    b"content-length: 0\r\n", b"") + chunked],
            ):  # fmt: skip
                async with connect(world) as client:
                    for part in data:
                        await client.send(part)
                    assert (await answer(client))[0] == 200
                    # The connection goes on, with and without an upgrade, in one piece, too.
                    await client.send(
                        request() + request(upgrade) + b"GET /health HTTP/1.1\r\nhost: t\r\n\r\n"
                    )
                    assert [(await answer(client))[0] for _ in range(3)] == [200, 200, 200]
            assert len(world.router.served) == 15

    run(main())


def test_a_tunnel_is_not_offered(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            async with connect(world) as client:
                await client.send(b"CONNECT example.org:443 HTTP/1.1\r\nhost: example.org\r\n\r\n")
                assert (await client.head())[0] == 400
            async with http_of(world) as http:
                assert (await http.get("/health")).status_code == 200

    run(main())


def test_a_wrong_method_is_told_the_right_ones(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            for method, path, allow in (
                ("POST", "/v1/models", "GET, HEAD, OPTIONS"),
                ("PUT", "/metrics", "GET, HEAD, OPTIONS"),
                ("GET", "/v1/chat/completions", "POST, OPTIONS"),
                ("DELETE", "/tokenize", "POST, OPTIONS"),
            ):
                reply = await http.request(method, path)
                assert (reply.status_code, reply.headers["allow"]) == (405, allow)
                asked = await http.options(path, headers={"origin": "https://a.example"})
                assert (asked.status_code, asked.headers["allow"], asked.content) == (204, allow, b"")
                assert "access-control-allow-origin" not in asked.headers
            for path in ("/health", "/v1/models", "/metrics", "/version"):
                head = await http.head(path)
                assert (head.status_code, head.content) == (200, b"")
                assert int(head.headers["content-length"]) > 0

    run(main())


def test_pages_of_chosen_origins_may_ask_and_others_not(model: Path) -> None:
    origins = '["https://a.example"]'
    settings = (f"gateway.cors_origins={origins}", 'gateway.api_keys=["k"]')

    async def main() -> None:
        async with gateway_world(model, *settings) as world, http_of(world) as http:
            world.router.answer = lambda served: served.end("length")
            for origin, status in (("https://a.example", 200), ("https://b.example", 400)):
                # A browser sends no key with it.
                preflight = await http.options(
                    "/v1/chat/completions",
                    headers={
                        "origin": origin,
                        "access-control-request-method": "POST",
                        "access-control-request-headers": "authorization,content-type,x-stainless-lang",
                    },
                )
                assert preflight.status_code == status
                allowed = preflight.headers.get("access-control-allow-origin")
                assert allowed == (origin if status == 200 else None)
                for stream in (False, True):
                    reply = await http.post(
                        "/v1/completions",
                        json={"model": "tiny", "prompt": "x", "stream": stream},
                        headers={"origin": origin, "authorization": "Bearer k"},
                    )
                    assert reply.status_code == 200
                    assert reply.headers.get("access-control-allow-origin") == allowed
                    assert not stream or reply.text.endswith("data: [DONE]\n\n")
                refused = await http.post("/v1/completions", json={}, headers={"origin": origin})
                assert refused.status_code == 401  # a page may read why
                assert refused.headers.get("access-control-allow-origin") == allowed
            exposed = (await http.get("/health", headers={"origin": "https://a.example"})).headers
            assert "x-request-id" in exposed["access-control-expose-headers"]

    run(main())


def test_a_stream_to_another_origin_comes_token_by_token(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, 'gateway.cors_origins=["*"]') as world, connect(world) as client:
            body = json.dumps({"model": "tiny", "prompt": "x", "stream": True}).encode()
            await client.send(request(b"origin: https://a.example\r\n", body=body))
            served = await world.router.request()
            served.send([65])
            status, headers = await client.head()
            assert (status, headers["access-control-allow-origin"]) == (200, "*")
            assert b'"text"' in await client.chunk()
            served.send([66])
            assert b'"text"' in await client.chunk()
            client.reset()
            await served.cancelled.wait()

    run(main())


@pytest.mark.parametrize(
    "origin", ["a.example", "https://a.example/path", "", "https://a.example, https://b"]
)
def test_what_is_no_origin_is_a_wrong_setting(origin: str) -> None:
    with pytest.raises(ConfigError) as caught:
        with_cors(lambda scope, receive, send: None, [origin])  # type: ignore[arg-type,return-value]
    assert caught.value.field == "gateway.cors_origins"


def test_absurd_heads_are_refused_or_ignored(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = lambda served: served.end("length")
            for extra, status in (
                (b"a:b\r\n" * 10_000, 400),
                (b"a:b\r\n" * 200, 200),
                (b"a: " + b"b" * 100_000 + b"\r\n", 200),
                (b"x-request-id: " + b"\xff" * 999 + b"\r\n", 200),
                (b"content-type: text/plain; charset=utf-7\r\n", 200),
                (b"content-type: \xff\r\n", 200),
                (b"accept: application/xml\r\nte: trailers\r\nrange: bytes=0-1\r\n", 200),
                (b"content-encoding: identity\r\n", 200),
                (b"content-encoding: gzip\r\n", 400),
                (b"x-microserve-strategy: \xe9\r\n", 400),
                (b"x-microserve-strategy: " + b"x" * 129 + b"\r\n", 400),
                (b"content-length: 29\r\n", 400),
            ):
                async with connect(world) as client:
                    await client.send(request(extra))
                    assert (await client.head())[0] == status, extra[:60]

    run(main())


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"\xef\xbb\xbf" + BODY, 400),
        (BODY.decode().encode("utf-16"), 400),
        (BODY[:-1] + b',"model":"tiny"}', 200),  # of two with one name the last counts, as everywhere
        (BODY[:-1] + b',"model":"other"}', 404),
        (BODY[:-1] + b',"top_k":1,"top_k":-5}', 400),
        (BODY[:-1] + b',"user":"\xff"}', 400),
        (BODY[:-1] + b',"user":"\xed\xa0\x80"}', 400),
        (BODY + b"\n\n", 200),
        (BODY + BODY, 400),
        (b"[" + BODY + b"]", 400),
        (b"", 400),
    ],
)
def test_bodies_that_are_nearly_json(model: Path, body: bytes, status: int) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = lambda served: served.end("length")
            reply = await http.post("/v1/completions", content=body)
            assert reply.status_code == status
            assert status == 200 or reply.json()["error"]["message"]

    run(main())


def test_a_client_that_waits_before_its_body_is_told_to_go_on(model: Path) -> None:
    async def main() -> None:
        async with gateway_world(model, 'gateway.api_keys=["k"]') as world:
            world.router.answer = lambda served: served.end("length")
            async with connect(world) as client:
                whole = request(b"expect: 100-continue\r\nauthorization: Bearer k\r\n")
                await client.send(whole[: -len(BODY)])
                assert await client.reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
                await client.send(BODY)
                assert (await answer(client))[0] == 200
            async with connect(world) as client:  # one that has no key need not send it at all
                await client.send(request(b"expect: 100-continue\r\n")[: -len(BODY)])
                assert (await answer(client))[0] == 401

    run(main())


@pytest.mark.parametrize("value", ["nan", "-1", "0", "5e-324", "1e999", "x", "", "1,5", "9" * 400])
def test_a_time_that_is_none_is_named(model: Path, value: str) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = lambda served: served.end("length")
            headers = {"x-microserve-timeout-s": value}
            reply = await http.post("/v1/completions", content=BODY, headers=headers)
            if value not in ("1e999", "9" * 400):  # as long as the gateway allows
                assert reply.status_code == 400
                assert reply.json()["error"]["param"] == "x-microserve-timeout-s"
            else:
                assert reply.status_code == 200

    run(main())
