"""Responses that are kept: gone on from, looked at and thrown away, by their key alone; and what cannot be
kept is answered all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tokenizers import Tokenizer

from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.gateway.kept.store import Store
from microserve.gateway.keys.key import digest_of
from microserve.gateway.responses.keeping import names_of
from microserve.gateway.responses.schema import InputItem, ResponsesRequest
from microserve.protocol.errors import InvalidRequest
from tests.support.gateway.gateway_world import GatewayWorld, gateway_world, run
from tests.support.gateway.talking_model import TOOLS, call, make_talking_model, saying, talking_tokenizer

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

FLAT: list[Any] = [{"type": "function", **tool["function"]} for tool in TOOLS]
NOBODY = "resp_" + "0" * 32


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


def client_of(world: GatewayWorld, key: str = "none") -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{world.address}/v1", api_key=key, max_retries=0)


def last_prompt(world: GatewayWorld, tokens: Tokenizer) -> str:
    served = list(world.router.served.values())[-1]
    return tokens.decode(served.tokens, skip_special_tokens=False)


def kept_at(path: Path, **bounds: Any) -> list[str]:
    return [
        f"gateway.responses_path={path / 'responses.db'}",
        *(f"gateway.responses_{name}={value}" for name, value in bounds.items()),
    ]


@pytest.mark.parametrize("streams", [False, True])
def test_a_conversation_goes_on_from_its_last_response(
    talker: Path, tokens: Tokenizer, tmp_path: Path, streams: bool
) -> None:
    """As if the client had sent all of it: calls and results too, without the former instructions."""

    async def main() -> None:
        async with (
            gateway_world(talker, *kept_at(tmp_path), max_model_len=2048) as world,
            client_of(world) as client,
        ):
            world.router.answer = saying(tokens, "So:" + call("weather", city="Oslo"))
            asked: dict[str, Any] = {
                "model": "tiny",
                "input": "hi",
                "instructions": "be brief",
                "tools": FLAT,
            }
            if streams:
                async with client.responses.stream(**asked) as stream:
                    first: Any = await stream.get_final_response()
            else:
                first = await client.responses.create(**asked)
            assert first.store is True
            [weather] = [item for item in first.output if item.type == "function_call"]

            world.router.answer = saying(tokens, "It rains.")
            result: Any = {"type": "function_call_output", "call_id": weather.call_id, "output": "rain"}
            second = await client.responses.create(
                model="tiny", previous_response_id=first.id, input=[result], instructions="be kind"
            )
            assert second.previous_response_id == first.id
            assert last_prompt(world, tokens) == (
                "<|im_start|>system\nbe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n"
                "<|im_start|>assistant\nSo:<tool_call>\n"
                '{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>\n'
                "<|im_start|>tool\nrain<|im_end|>\n<|im_start|>assistant\n"
            )

            # One entry is enough to go on.
            await client.responses.delete(first.id)
            third = await client.responses.create(
                model="tiny", previous_response_id=second.id, input="thanks"
            )
            assert "It rains.<|im_end|>\n<|im_start|>user\nthanks" in last_prompt(world, tokens)

            found = await client.responses.retrieve(third.id)
            assert found.model_dump() == third.model_dump()
            page = await client.responses.input_items.list(third.id, order="asc")
            items = [json.loads(item.model_dump_json(exclude_unset=True)) for item in page.data]
            assert [item["type"] for item in items] == [
                "message", "message", "function_call", "function_call_output", "message", "message",
            ]  # fmt: skip
            assert items[0]["content"] == [{"type": "input_text", "text": "hi"}]
            assert items[1]["id"] == first.output[0].id
            assert len({item["id"] for item in items}) == 6
            newest = await client.responses.input_items.list(third.id, limit=1)
            assert [item.id for item in newest.data] == [items[-1]["id"]]
            assert newest.has_more
            rest = await client.responses.input_items.list(third.id, limit=100, after=items[-1]["id"])
            assert [item.id for item in rest.data] == [item["id"] for item in items[-2::-1]]

    run(main())


def test_items_are_referred_to_by_their_names(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_world(talker, *kept_at(tmp_path)) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "It rains.")
            first = await client.responses.create(model="tiny", input="hi")
            items: Any = [
                {"role": "user", "content": "well?"},
                {"type": "item_reference", "id": first.output[0].id},
                {"role": "user", "content": "oh"},
            ]
            await client.responses.create(model="tiny", input=items)
            assert last_prompt(world, tokens).endswith(
                "user\nwell?<|im_end|>\n<|im_start|>assistant\nIt rains.<|im_end|>\n"
                "<|im_start|>user\noh<|im_end|>\n<|im_start|>assistant\n"
            )
            items[1]["id"] = f"{first.output[0].id}7"
            with pytest.raises(openai.BadRequestError, match=r"input\[1\]\.id"):
                await client.responses.create(model="tiny", input=items)

    run(main())


SECRETS = {"one": "sk-one-0123456789abcdef", "two": "sk-two-0123456789abcdef"}


def test_another_key_finds_nothing(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    """Names of keys are what entries belong to: here those of a file."""
    keys = tmp_path / "keys.toml"

    async def main() -> None:
        keys.write_text(
            "".join(f'[keys.{name}]\nsha256 = "{digest_of(secret)}"\n' for name, secret in SECRETS.items())
        )
        settings = [*kept_at(tmp_path), f"gateway.api_keys_file={keys}"]
        async with gateway_world(talker, *settings) as world:
            world.router.answer = saying(tokens, "Hello")
            async with client_of(world, SECRETS["one"]) as one, client_of(world, SECRETS["two"]) as two:
                mine = await one.responses.create(model="tiny", input="hi")
                asks: list[Any] = [
                    lambda: two.responses.retrieve(mine.id),
                    lambda: two.responses.delete(mine.id),
                    lambda: two.responses.input_items.list(mine.id),
                    lambda: two.responses.create(model="tiny", input="x", previous_response_id=mine.id),
                ]
                for ask in asks:
                    with pytest.raises(openai.NotFoundError):
                        await ask()
                assert (await one.responses.retrieve(mine.id)).id == mine.id

    run(main())


@pytest.mark.parametrize("is_on", [True, False])
def test_what_is_not_kept_is_not_found(talker: Path, tokens: Tokenizer, tmp_path: Path, is_on: bool) -> None:
    """``store: false``, or a gateway that keeps nothing."""

    async def main() -> None:
        settings = kept_at(tmp_path) if is_on else []
        async with (
            gateway_world(talker, *settings) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, "Hello")
            body = {"model": "tiny", "input": "hi", "store": not is_on}
            reply = (await http.post("/v1/responses", json=body)).json()
            assert reply["store"] is False
            for name in (reply["id"], NOBODY, "resp_x"):
                for path in (f"/v1/responses/{name}", f"/v1/responses/{name}/input_items"):
                    found = await http.get(path)
                    assert (found.status_code, found.json()["error"]["code"]) == (404, "response_not_found")
                assert (await http.delete(f"/v1/responses/{name}")).status_code == 404
            for name, status in ((reply["id"], 404), ("resp_x", 400)):
                again = await http.post("/v1/responses", json={**body, "previous_response_id": name})
                assert (again.status_code, again.json()["error"]["param"]) == (status, "previous_response_id")

    run(main())


def test_gateways_share_what_is_kept(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    """As the workers of one do: a client need not come back to who has answered it."""

    async def main() -> None:
        async with (
            gateway_world(talker, *kept_at(tmp_path)) as one,
            gateway_world(talker, *kept_at(tmp_path)) as other,
            client_of(one) as here,
            client_of(other) as there,
        ):
            one.router.answer = other.router.answer = saying(tokens, "Hello")
            first = await here.responses.create(model="tiny", input="hi")
            assert (await there.responses.retrieve(first.id)).id == first.id
            await there.responses.create(model="tiny", input="x", previous_response_id=first.id)
            assert "assistant\nHello<|im_end|>" in last_prompt(other, tokens)
            await there.responses.delete(first.id)
            with pytest.raises(openai.NotFoundError):
                await here.responses.retrieve(first.id)

    run(main())


def test_only_as_many_are_kept_as_may_be(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            gateway_world(talker, *kept_at(tmp_path, count=2)) as world,
            client_of(world) as client,
        ):
            world.router.answer = saying(tokens, "Hello")
            made = [await client.responses.create(model="tiny", input="hi") for _ in range(3)]
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(made[0].id)
            for each in made[1:]:
                assert (await client.responses.retrieve(each.id)).id == each.id

    run(main())


def test_a_disk_that_fails_costs_no_answer(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    async def main() -> None:
        async with gateway_world(talker, *kept_at(tmp_path / "nowhere")) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "Hello")
            response = await client.responses.create(model="tiny", input="hi")
            assert response.output_text == "Hello"
            async with client.responses.stream(model="tiny", input="hi") as stream:
                assert (await stream.get_final_response()).output_text == "Hello"
            with pytest.raises(openai.InternalServerError) as refused:
                await client.responses.retrieve(response.id)
            assert refused.value.status_code == 503

    run(main())


@pytest.mark.parametrize("is_large", ["body", "history", "both"])
def test_large_bodies_and_histories_go_on_too(
    talker: Path, tokens: Tokenizer, tmp_path: Path, is_large: str
) -> None:
    """A helper reads them: the prompt and what is kept are the same."""
    large = "x" * INLINE_BODY_NBYTES

    async def main() -> None:
        async with (
            gateway_world(talker, *kept_at(tmp_path), max_model_len=300_000) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, "Hello")
            said = "a" if is_large == "body" else large
            first = (await http.post("/v1/responses", json={"model": "tiny", "input": said})).json()
            body = {"model": "tiny", "input": "b", "previous_response_id": first["id"]}
            if is_large != "history":
                body["unknown"] = large
            reply = await http.post("/v1/responses", json=body)
            assert reply.status_code == 200, reply.text
            prompt = last_prompt(world, tokens)
            assert prompt.count("<|im_start|>") == 4
            assert f"user\n{said}<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n" in prompt
            items = await http.get(f"/v1/responses/{reply.json()['id']}/input_items?order=asc")
            texts = [item["content"][0]["text"] for item in items.json()["data"]]
            assert texts == [said, "Hello", "b"]
            body["previous_response_id"] = NOBODY
            assert (await http.post("/v1/responses", json=body)).status_code == 404

    run(main())


def test_what_is_referred_to_is_bounded_as_a_body_is(talker: Path, tokens: Tokenizer, tmp_path: Path) -> None:
    """A few hundred bytes may refer to the most that is kept, many times over; no template looks at some of
    it. Nothing is held of what is over."""
    thought = {"type": "reasoning", "summary": [], "encrypted_content": "", "phase": "x" * 400_000}

    async def main() -> None:
        settings = [*kept_at(tmp_path), "gateway.max_body_mb=1"]
        async with (
            gateway_world(talker, *settings, max_model_len=2048) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, "Hello")

            async def ask(*items: Any) -> httpx.Response:
                return await http.post("/v1/responses", json={"model": "tiny", "input": list(items)})

            said = {"role": "user", "content": "hi"}
            made = [(await ask(said, thought)).json() for _ in range(3)]
            assert all(each["store"] for each in made)
            named = [{"type": "item_reference", "id": each["output"][0]["id"]} for each in made]
            assert (await ask(*named[:2], said)).status_code == 200
            refused = await ask(*named, said)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[2].id")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Store, "hold", lambda store, nbytes: False)
                assert (await ask(said)).json()["store"] is False

    run(main())


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("order=up", "order"),
        ("limit=0", "limit"),
        ("limit=101", "limit"),
        ("limit=x", "limit"),
        ("after=y", "after"),
    ],
)
def test_a_page_that_is_none_is_refused(
    talker: Path, tokens: Tokenizer, tmp_path: Path, query: str, param: str
) -> None:
    async def main() -> None:
        async with (
            gateway_world(talker, *kept_at(tmp_path)) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = saying(tokens, "Hello")
            made = (await http.post("/v1/responses", json={"model": "tiny", "input": "hi"})).json()
            reply = await http.get(f"/v1/responses/{made['id']}/input_items?{query}")
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)
            streamed = await http.get(f"/v1/responses/{made['id']}?stream=true")
            assert streamed.status_code == 400

    run(main())


def test_what_a_body_needs() -> None:
    own = [f"msg_{'0' * 31}{number:x}_0" for number in range(3)]
    items = [InputItem(type="item_reference", id=name) for name in (own[0], own[1], own[0], "msg_elsewhere")]
    body = ResponsesRequest(model="m", input=items, previous_response_id=f"resp_{'0' * 31}2")
    assert names_of(body) == {
        f"resp_{'0' * 31}2": "previous_response_id",
        f"resp_{'0' * 31}0": "input[0].id",
        f"resp_{'0' * 31}1": "input[1].id",
    }
    many = [InputItem(type="item_reference", id=f"msg_{number:032x}_0") for number in range(33)]
    with pytest.raises(InvalidRequest, match="more than 32 responses"):
        names_of(ResponsesRequest(model="m", input=many))
