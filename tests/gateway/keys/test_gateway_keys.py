"""Named keys at a served gateway: who may what, how much, what the headers say, and whose use it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from structlog.testing import capture_logs
from tokenizers import Tokenizer

from microserve.gateway.keys import reader as key_reader
from microserve.gateway.keys.key import ApiKey, digest_of, entry_of
from microserve.gateway.keys.ledger import read_counts
from microserve.gateway.keys.usage import Counts
from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.gateway import GatewaySettings
from microserve.protocol.settings.settings import Settings
from tests.support.gateway.gateway_world import GatewayWorld, Served, connect, gateway_world, run

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

BODY = {"model": "tiny", "prompt": "a b", "max_tokens": 4}
COMPLETIONS = "/v1/completions"


def key(name: str, **fields: Any) -> ApiKey:
    return ApiKey(name=name, sha256=(digest_of(f"key of {name}"),), **fields)


def bearer(name: str) -> dict[str, str]:
    return {"authorization": f"Bearer key of {name}"}


def write(path: Path, *keys: ApiKey) -> None:
    path.write_text("".join(map(entry_of, keys)))


@asynccontextmanager
async def keyed(
    model: Path, path: Path, *keys: ApiKey, settings: tuple[str, ...] = ()
) -> AsyncIterator[tuple[GatewayWorld, httpx.AsyncClient]]:
    """A gateway with these keys, whose router answers every request with two tokens."""
    write(path, *keys)
    async with (
        gateway_world(model, f"gateway.api_keys_file={path}", *settings) as world,
        httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
    ):

        def answer(served: Served) -> None:
            served.send([5, 6])
            served.end("length", cached_tokens=1)

        world.router.answer = answer
        yield world, http


def code_of(reply: httpx.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def test_each_key_is_known_by_its_name_and_by_nothing_else(model: Path, tmp_path: Path) -> None:
    path, usage = tmp_path / "keys.toml", tmp_path / "usage.db"

    async def main() -> None:
        ops = key("ops", operator=True)
        settings = (f"gateway.usage_path={usage}",)
        with capture_logs() as lines:
            async with keyed(model, path, key("alice"), key("bob"), ops, settings=settings) as (world, http):
                for name in ("alice", "alice", "bob"):
                    reply = await http.post(COMPLETIONS, json=BODY, headers=bearer(name))
                    assert reply.status_code == 200
                served = next(iter(world.router.served.values())).message
                assert (served.tenant, served.priority, served.salt) == ("alice", 0, "key/alice/")
                assert code_of(await http.get("/metrics", headers=bearer("bob"))) == (
                    403,
                    "permission_denied",
                )
                text = (await http.get("/metrics", headers=bearer("ops"))).text
                assert 'microserve_key_requests_total{key="alice"} 2.0' in text
                assert 'microserve_key_output_tokens_total{key="bob"} 2.0' in text
                prompt_tokens = len(next(iter(world.router.served.values())).tokens)
        finished = [line["key"] for line in lines if line["event"] == log.REQUEST_FINISHED]
        assert finished == ["alice", "alice", "bob"]
        assert "key of" not in repr(lines) and digest_of("key of alice") not in repr(lines)
        used = {name: counts for (_, name), counts in read_counts(usage).items()}
        assert used == {
            "alice": Counts(2, 0, 2 * prompt_tokens, 2, 4),
            "bob": Counts(1, 0, prompt_tokens, 1, 2),
        }

    run(main())


def test_limits_are_told_on_every_answer_and_kept(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        limited = key("a", requests_per_minute=3, tokens_per_minute=600)
        async with keyed(model, tmp_path / "keys", limited, key("b")) as (world, http):
            reply = await http.post(COMPLETIONS, json=BODY, headers=bearer("a"))
            assert reply.headers["x-ratelimit-limit-requests"] == "3"
            assert reply.headers["x-ratelimit-remaining-requests"] == "2"
            reset = reply.headers["x-ratelimit-reset-requests"]
            assert reset.endswith("s") and 1 <= int(reset[:-1]) <= 20
            num_prompt = len(next(iter(world.router.served.values())).tokens)
            reserved = num_prompt + 4
            assert 600 - reserved <= int(reply.headers["x-ratelimit-remaining-tokens"]) < 600
            # A refused one counts as a request, and its tokens do not.
            reply = await http.post(COMPLETIONS, json={**BODY, "n": 0}, headers=bearer("a"))
            assert reply.status_code == 400
            assert reply.headers["x-ratelimit-remaining-requests"] == "1"
            assert int(reply.headers["x-ratelimit-remaining-tokens"]) >= 600 - num_prompt - 2
            async with http.stream(
                "POST", COMPLETIONS, json={**BODY, "stream": True}, headers=bearer("a")
            ) as stream:
                assert stream.headers["x-ratelimit-remaining-requests"] == "0"
                await stream.aread()
            reply = await http.post(COMPLETIONS, json=BODY, headers=bearer("a"))
            assert code_of(reply) == (429, "rate_limit_exceeded")
            assert 1 <= int(reply.headers["retry-after"]) <= 20
            assert reply.headers["x-ratelimit-remaining-requests"] == "0"
            models = await http.get("/v1/models", headers=bearer("a"))
            assert models.status_code == 200 and "x-ratelimit-limit-requests" in models.headers
            reply = await http.post(COMPLETIONS, json=BODY, headers=bearer("b"))
            assert reply.status_code == 200 and "x-ratelimit-limit-requests" not in reply.headers

    run(main())


def test_streams_at_a_time(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed(model, tmp_path / "keys", key("a", concurrent_streams=1)) as (world, http):
            world.router.answer = None
            first = asyncio.create_task(http.post(COMPLETIONS, json=BODY, headers=bearer("a")))
            served = await world.router.request()
            reply = await http.post(COMPLETIONS, json=BODY, headers=bearer("a"))
            assert code_of(reply) == (429, "rate_limit_exceeded") and reply.headers["retry-after"] == "1"
            served.end("length")
            assert (await first).status_code == 200
            reply = await http.post(COMPLETIONS, json={**BODY, "n": 2}, headers=bearer("a"))
            assert (*code_of(reply), reply.json()["error"]["param"]) == (400, "invalid_request", "n")
            world.router.answer = lambda served: served.end("length")
            assert (await http.post(COMPLETIONS, json=BODY, headers=bearer("a"))).status_code == 200

    run(main())


def test_one_key_cannot_take_all_streams(model: Path, tmp_path: Path) -> None:
    settings = ("gateway.max_streams=18",)

    async def main() -> None:
        async with keyed(model, tmp_path / "keys", key("a"), key("b"), settings=settings) as (world, http):
            world.router.answer = None

            def ask(name: str) -> asyncio.Task[httpx.Response]:
                return asyncio.create_task(http.post(COMPLETIONS, json=BODY, headers=bearer(name)))

            flood = [ask("a") for _ in range(30)]
            while len(world.router.served) + sum(each.done() for each in flood) < 30:
                await asyncio.sleep(0.01)
            refused = [each.result() for each in flood if each.done()]
            assert {code_of(reply) for reply in refused} == {(429, "queue_full")}
            assert 12 <= len(refused) <= 20
            other = ask("b")
            while len(world.router.served) + len(refused) < 31:
                await asyncio.sleep(0.01)
            for served in world.router.served.values():
                served.end("length")
            assert (await other).status_code == 200
            await asyncio.gather(*flood)

    run(main())


def test_a_spent_budget(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        async with keyed(model, tmp_path / "keys", key("a", daily_token_budget=3)) as (world, http):
            assert (await http.post(COMPLETIONS, json=BODY, headers=bearer("a"))).status_code == 200
            client = openai.AsyncOpenAI(base_url=f"{world.address}/v1", api_key="key of a", max_retries=0)
            async with client:
                with pytest.raises(openai.RateLimitError) as caught:
                    await client.completions.create(model="tiny", prompt="a")
            assert caught.value.code == caught.value.type == "insufficient_quota"

    run(main())


def test_models_and_strategies(model: Path, tmp_path: Path) -> None:
    async def main() -> None:
        keys = key("other", models=("large",)), key("a", strategies=("balanced", "auto"), priority=7)
        async with keyed(model, tmp_path / "keys", *keys) as (world, http):
            reply = await http.post(COMPLETIONS, json=BODY, headers=bearer("other"))
            assert code_of(reply) == (404, "model_not_found")
            assert (await http.get("/v1/models", headers=bearer("other"))).json()["data"] == []
            assert code_of(await http.get("/v1/models/tiny", headers=bearer("other")))[0] == 404
            tokenized = await http.post("/tokenize", json={"prompt": "a"}, headers=bearer("other"))
            assert code_of(tokenized)[0] == 404

            async def ask(strategy: str | None) -> httpx.Response:
                named = {"x-microserve-strategy": strategy} if strategy else {}
                return await http.post(COMPLETIONS, json=BODY, headers={**bearer("a"), **named})

            assert code_of(await ask("disaggregated")) == (403, "permission_denied")
            for asked, served_by in ((None, "balanced"), ("auto", "auto"), ("balanced", "balanced")):
                assert (await ask(asked)).status_code == 200
                message = list(world.router.served.values())[-1].message
                assert (message.strategy, message.priority) == (served_by, 7)

    run(main())


def test_caches_are_apart_unless_they_are_shared(model: Path, tmp_path: Path) -> None:
    async def salts(*settings: str) -> list[str]:
        keys = key("a"), key("b")
        async with keyed(model, tmp_path / "keys", *keys, settings=settings) as (world, http):
            for name in ("a", "b"):
                for salt in ({}, {"cache_salt": "mine"}, {"cache_salt": "key/a/"}):
                    reply = await http.post(COMPLETIONS, json={**BODY, **salt}, headers=bearer(name))
                    assert reply.status_code == 200
            return [served.message.salt for served in world.router.served.values()]

    apart = run(salts())
    assert len(set(apart)) == 6
    shared = run(salts("gateway.shared_prefix_cache=true"))
    assert shared[:3] == shared[3:] and len(set(shared)) == 3 and not set(shared[:3]) & set(apart)


def test_keys_come_and_go_without_a_restart(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_reader, "LOOK_S", 0.01)
    path = tmp_path / "keys"

    async def main() -> None:
        async with keyed(model, path, key("a")) as (world, http):

            async def until(name: str, status: int) -> None:
                while (await http.get("/v1/models", headers=bearer(name))).status_code != status:
                    await asyncio.sleep(0.01)

            world.router.answer = None
            running = asyncio.create_task(http.post(COMPLETIONS, json=BODY, headers=bearer("a")))
            served = await world.router.request()
            path.write_text(entry_of(key("b")))
            await until("b", 200)
            await until("a", 401)
            path.write_text("no TOML")
            await asyncio.sleep(0.05)
            await until("b", 200)
            served.end("length")
            assert (await running).status_code == 200, "what had begun goes on"

    run(main())


def test_a_reload_reads_everything_anew_and_opens_nothing(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "keys"

    def settings(*api_keys: str) -> Settings:
        return Settings(gateway=GatewaySettings(api_keys=list(api_keys)))

    async def main() -> None:
        async with keyed(model, path, key("a"), settings=('gateway.api_keys=["old"]',)) as (world, http):
            write(path, key("b"))
            world.lifecycle.reload(settings("new"))
            while await status_of(http, "new") != 200:
                await asyncio.sleep(0.01)
            tried = [await status_of(http, each) for each in ("old", "key of a", "key of b")]
            assert tried == [401, 401, 200]
        async with (
            gateway_world(model, 'gateway.api_keys=["only"]') as world,
            httpx.AsyncClient(base_url=world.address) as http,
        ):
            world.lifecycle.reload(settings())
            assert [await status_of(http, each) for each in ("", "only")] == [401, 401]
        async with gateway_world(model) as world, httpx.AsyncClient(base_url=world.address) as http:
            world.lifecycle.reload(settings())
            assert await status_of(http, "") == 200
            world.lifecycle.reload(settings("first"))
            assert [await status_of(http, each) for each in ("", "first")] == [401, 200]

    run(main())


async def status_of(http: httpx.AsyncClient, api_key: str) -> int:
    headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
    return (await http.get("/v1/models", headers=headers)).status_code


ODD = [
    b"Bearer \xff\xfe",
    b"Bearer \xc3\xbc",
    b"Bearer",
    b"",
    b"   ",
    b"bearer  ",
    b"Basic abc",
    b"Bearer a b c",
]


@pytest.mark.parametrize("settings", [(), ('gateway.api_keys=["\\u00fc"]',)])
def test_odd_keys_are_refused_and_break_nothing(
    model: Path, tmp_path: Path, settings: tuple[str, ...]
) -> None:
    async def main() -> None:
        async with keyed(model, tmp_path / "keys", key("a"), settings=settings) as (world, _):
            for header in (b"authorization", b"x-api-key"):
                for value in [*ODD, b"x" * 60_000]:
                    async with connect(world) as connection:
                        head = (
                            b"GET /v1/models HTTP/1.1\r\nhost: x\r\n" + header + b": " + value + b"\r\n\r\n"
                        )
                        await connection.send(head)
                        status, _ = await connection.head()
                    ours = bool(settings) and value == b"Bearer \xc3\xbc" and header == b"authorization"
                    assert status == (200 if ours else 401), (header, value[:20])

    run(main())


# --- who may reach it -------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_beyond_the_machine_only_with_keys_or_on_purpose(model: Path, tmp_path: Path, host: str) -> None:
    async def start(*settings: str) -> None:
        async with gateway_world(model, f"gateway.host={host}", *settings):
            pass

    with pytest.raises(ConfigError) as caught:
        run(start())
    assert caught.value.field == "gateway.host" and "gateway.allow_no_keys" in str(caught.value)
    run(start("gateway.allow_no_keys=true"))
    run(start('gateway.api_keys=["k"]'))
    (tmp_path / "keys").write_text("")
    run(start(f"gateway.api_keys_file={tmp_path / 'keys'}"))


def test_the_machine_itself_needs_no_keys(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def start(host: str) -> None:
        async with gateway_world(model, f"gateway.host={host}"):
            pass

    for host in ("localhost", "127.0.0.5", "::1"):
        run(start(host))
