"""``echo``, ``prompt_logprobs`` and ``best_of`` as clients see them, against a router that the test plays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from tokenizers import Tokenizer

from microserve.gateway.openai.replies import ChatReply, CompletionReply
from microserve.gateway.text.answer import echo as echo_module
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import PromptLogprob, PromptLogprobs, packed
from tests.gateway.test_api import events_of, http_of
from tests.support.gateway.gateway_world import GatewayWorld, Served, gateway_world, run, special_id

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time

PATH = "/v1/completions"


def rows_of(served: Served, begin: int, end: int) -> PromptLogprobs:
    """At each place the token itself is second to its neighbour."""
    num_top = served.message.sampling.prompt_logprobs
    assert num_top is not None
    told = [
        PromptLogprob(-1.0, 2, ((token + 1, -0.5), (token, -1.0))[:num_top])
        for token in served.tokens[begin:end]
    ]
    return packed(begin, num_top, told)


def saying(tokenizer: Tokenizer, *texts: str, end: str = "") -> Callable[[Served], None]:
    """A router that tells of prompts in two pieces, and answers the requests in turn with ``texts``; each of
    their tokens has the log-probability -1 / the number of its text, the first one's is 1. ``end``: the stop
    token behind it."""
    numbers: list[int] = []

    def answer(served: Served) -> None:
        numbers.append(len(numbers) + 1)
        sampling, text = served.message.sampling, texts[(len(numbers) - 1) % len(texts)]
        if sampling.prompt_logprobs is not None and len(served.tokens) > 1:
            middle = max(1, len(served.tokens) // 2)
            served.send(prompt=rows_of(served, 1, middle))
            served.send(prompt=rows_of(served, middle, len(served.tokens)))
        ids = tokenizer.encode(text).ids if sampling.max_tokens else []
        ids += [special_id(tokenizer, end)] if end else []
        for token_id in ids:
            logprobs = [
                TokenLogprob(-1.0 / numbers[-1], [(token_id, -1.0 / numbers[-1])][: sampling.logprobs])
            ]
            served.send([token_id], logprobs=[] if sampling.logprobs is None else logprobs)
        served.end("stop" if end else "length", **({"stop_token_id": ids[-1]} if end else {}))

    return answer


async def ask(world: GatewayWorld, path: str = PATH, **body: Any) -> Any:
    async with http_of(world) as http:
        reply = await http.post(path, json={"model": "tiny", "prompt": "Hello you", **body})
        assert reply.status_code == 200, reply.text
        kind = CompletionReply if path == PATH else ChatReply
        return check(reply, kind)


def check(reply: httpx.Response, kind: type[Any]) -> Any:
    msgspec.json.decode(reply.content, type=kind)  # as /openapi.json says
    return reply.json()


@pytest.mark.parametrize("end", ["", "<|im_end|>"])
def test_what_lm_eval_asks_and_reads(model: Path, raw_tokenizer: Tokenizer, end: str) -> None:
    """Prompts of ids: prompt entries and exactly one more, also where that ends the answer at once."""

    async def main() -> None:
        async with gateway_world(model) as world:
            prompts = [raw_tokenizer.encode(text).ids for text in ("Hello you", "a b c d", "x")]
            world.router.answer = saying(raw_tokenizer, "" if end else "y", end=end)
            body: dict[str, Any] = {
                "temperature": 0,
                "max_tokens": 1,
                "logprobs": 1,
                "seed": 1234,
                "echo": True,
            }
            reply = await ask(world, prompt=prompts, **body)
            sent = {tuple(served.tokens): served for served in world.router.served.values()}
            assert set(sent) == {tuple(prompt) for prompt in prompts}, "no token is added to ids"
            assert all(served.message.sampling.prompt_logprobs == 1 for served in sent.values())
            assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2]
            for prompt, choice in zip(prompts, reply["choices"], strict=True):
                told = choice["logprobs"]
                assert {len(each) for each in told.values()} == {len(prompt) + 1}
                assert told["token_logprobs"] == [
                    None,
                    *[-1.0] * (len(prompt) - 1),
                    *told["token_logprobs"][-1:],
                ]
                assert told["top_logprobs"][0] is None
                for token, own, top in list(
                    zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
                )[1:-1]:
                    assert top[token] == own and max(top.values()) == -0.5, "itself, and the likeliest"
                assert choice["text"] == raw_tokenizer.decode(prompt) + ("" if end else "y")
                assert "".join(told["tokens"][: len(prompt)]) == raw_tokenizer.decode(prompt)
                assert choice["finish_reason"] == ("stop" if end else "length")
                offsets = [0]
                for token in told["tokens"][:-1]:
                    offsets.append(offsets[-1] + len(token))
                assert told["text_offset"] == offsets

    run(main())


def test_a_likelier_token_of_the_same_text_is_not_lost(model: Path) -> None:
    """What is named alike would be one key: the prompt's token would seem to be the likeliest."""

    async def main() -> None:
        async with gateway_world(model) as world:

            def answer(served: Served) -> None:
                top = ((901, -0.5),)
                served.send(prompt=packed(1, 1, [PromptLogprob(-1.0, 2, top)] * (len(served.tokens) - 1)))
                served.end()

            world.router.answer = answer
            reply = await ask(world, prompt=[[5, 900]], max_tokens=0, logprobs=1, echo=True)
            told = reply["choices"][0]["logprobs"]
            assert told["tokens"][1] == ""
            assert told["top_logprobs"][1] == {"": -1.0, "token_id:901": -0.5}

    run(main())


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("logprobs", [None, 0, 1])
@pytest.mark.parametrize("max_tokens", [0, 5])
def test_a_stream_says_what_a_reply_says(
    model: Path, raw_tokenizer: Tokenizer, n: int, logprobs: int | None, max_tokens: int
) -> None:
    """Once a prompt: the first choice asks for what is told of it, and all begin with that."""

    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = saying(raw_tokenizer, "one", " 😀")
            body: dict[str, Any] = {
                "prompt": ["Hello you", "a 你"],
                "n": n,
                "logprobs": logprobs,
                "max_tokens": max_tokens,
            }
            reply = await ask(world, **body, echo=True)
            asked = [served.message.sampling.prompt_logprobs for served in world.router.served.values()]
            assert asked == ([logprobs] + [None] * (n - 1)) * 2
            world.router.answer = saying(raw_tokenizer, "one", " 😀")
            fields = {"model": "tiny", **body, "echo": True, "stream": True}
            events = events_of((await http.post(PATH, json=fields)).text)[:-1]
            for choice in reply["choices"]:
                index = choice["index"]
                chunks = [each for event in events for each in event["choices"] if each["index"] == index]
                assert "".join(chunk["text"] for chunk in chunks) == choice["text"]
                assert choice["text"].startswith(["Hello you", "a 你"][index // n])
                assert chunks[-1]["finish_reason"] == choice["finish_reason"] == "length"
                told = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"] is not None]
                if logprobs is None:
                    assert choice["logprobs"] is None and not told
                    continue
                for name, whole in choice["logprobs"].items():
                    assert [entry for part in told for entry in part[name]] == whole
            assert reply["usage"]["prompt_tokens"] == sum(
                len(raw_tokenizer.encode(text).ids) for text in ("Hello you", "a 你")
            )

    run(main())


def test_a_long_echo_lets_others_through(model: Path, raw_tokenizer: Tokenizer) -> None:
    """It is shown in many goes; whoever asks meanwhile is answered first."""

    async def main() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(echo_module, "MAX_TOKENS_AT_ONCE", 3)
            async with gateway_world(model) as world:
                world.router.answer = saying(raw_tokenizer, "z")
                text = "ab " * 200
                reply = await ask(world, prompt=text, logprobs=1, echo=True)
                assert reply["choices"][0]["text"] == text + "z"
                assert len(reply["choices"][0]["logprobs"]["tokens"]) == reply["usage"]["total_tokens"]

    run(main())


@pytest.mark.parametrize("n", [1, 2])
def test_vllms_prompt_logprobs(model: Path, raw_tokenizer: Tokenizer, n: int) -> None:
    """Of completions in each choice, of conversations beside them."""

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = saying(raw_tokenizer, "one")
            reply = await ask(world, prompt_logprobs=1, n=n, max_tokens=4)
            prompt = raw_tokenizer.encode("Hello you").ids
            wanted = [None] + [
                {
                    str(token): {"logprob": -1.0, "rank": 2, "decoded_token": raw_tokenizer.decode([token])},
                    str(token + 1): {
                        "logprob": -0.5,
                        "rank": 1,
                        "decoded_token": raw_tokenizer.decode([token + 1], skip_special_tokens=False),
                    },
                }
                for token in prompt[1:]
            ]
            assert [choice["prompt_logprobs"] for choice in reply["choices"]] == [wanted] * n
            assert [choice["logprobs"] for choice in reply["choices"]] == [None] * n
            assert [choice["text"] for choice in reply["choices"]] == ["one"] * n
            messages = [{"role": "user", "content": "hi"}]
            chat = await ask(world, "/v1/chat/completions", messages=messages, prompt_logprobs=0, n=n)
            told = chat["prompt_logprobs"]
            tokens = [served.tokens for served in world.router.served.values()][-1]
            assert [None if each is None else [*each] for each in told] == [
                None,
                *([str(token)] for token in tokens[1:]),
            ]
            assert "prompt_logprobs" not in chat["choices"][0]

    run(main())


def test_an_echo_and_prompt_logprobs_of_other_width(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = saying(raw_tokenizer, "one")
            reply = await ask(world, echo=True, logprobs=0, prompt_logprobs=2, max_tokens=0)
            [choice] = reply["choices"]
            assert [served.message.sampling.prompt_logprobs for served in world.router.served.values()] == [2]
            assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1] * (
                len(choice["prompt_logprobs"]) - 1
            )
            assert all(len(each) == 2 for each in choice["prompt_logprobs"][1:])
            assert (choice["text"], choice["finish_reason"]) == ("Hello you", "length")

    run(main())


def test_tokens_by_their_ids(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = saying(raw_tokenizer, "one")
            ids = [*raw_tokenizer.encode("Hello you").ids, *raw_tokenizer.encode("one").ids]
            reply = await ask(world, echo=True, logprobs=1, return_tokens_as_token_ids=True)
            told = reply["choices"][0]["logprobs"]
            assert told["tokens"] == [f"token_id:{each}" for each in ids]
            assert set(told["top_logprobs"][1]) == {f"token_id:{ids[1]}", f"token_id:{ids[1] + 1}"}
            fields = {"messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 1}
            chat = await ask(world, "/v1/chat/completions", **fields, return_tokens_as_token_ids=True)
            content = chat["choices"][0]["logprobs"]["content"]
            named = [f"token_id:{each}" for each in raw_tokenizer.encode("one").ids]
            assert [entry["token"] for entry in content] == named
            assert [entry["top_logprobs"][0]["token"] for entry in content] == named

    run(main())


def test_the_best_of_several(model: Path, raw_tokenizer: Tokenizer) -> None:
    """By the mean of their tokens' log-probabilities: here the later, the likelier."""

    async def main() -> None:
        async with gateway_world(model) as world:
            world.router.answer = saying(raw_tokenizer, "one", "two two", "three", "four")
            reply = await ask(world, prompt=["a", "b"], best_of=4, n=2)
            assert [choice["text"] for choice in reply["choices"]] == ["four", "three"] * 2
            assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
            assert all(choice["logprobs"] is None for choice in reply["choices"])
            texts = ("one", "two two", "three", "four")
            assert reply["usage"]["completion_tokens"] == 2 * sum(
                len(raw_tokenizer.encode(text).ids) for text in texts
            ), "all that was generated"
            assert len(world.router.served) == 8
            plain = await ask(world, best_of=2, n=2)
            assert len(plain["choices"]) == 2

    run(main())


def test_of_several_that_ran_out_of_time_the_best_is_one_that_has_begun(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        async with gateway_world(model) as world:

            def answer(served: Served) -> None:
                if len(world.router.served) < 3:
                    return  # the first one's end, known before the second has begun, would be that of all
                ids = raw_tokenizer.encode("one").ids
                first, second, third = world.router.served.values()
                second.send(ids, logprobs=[TokenLogprob(-1.0, []) for _ in ids])
                for each in (first, second, third):
                    each.end("error", code="deadline_exceeded", detail="late")

            world.router.answer = answer
            reply = await ask(world, best_of=3, n=2)
            assert [choice["text"] for choice in reply["choices"]] == ["one", ""]

    run(main())


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"best_of": 1, "n": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 9}, "best_of"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"echo": True, "logprobs": 20, "prompt": [[5] * 500] * 128, "max_tokens": 1}, "logprobs"),
        ({"prompt_logprobs": 20, "prompt": [[5] * 500] * 128}, "prompt_logprobs"),
        ({"suffix": "x"}, "suffix"),
    ],
)
def test_what_is_refused_is_named(model: Path, body: dict[str, Any], field: str) -> None:
    async def main() -> None:
        async with gateway_world(model, "gateway.max_n=8") as world, http_of(world) as http:
            reply = await http.post(PATH, json={"model": "tiny", "prompt": "Hello", **body})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, field), reply.text
            assert not world.router.served

    run(main())


def test_a_prompt_as_long_as_the_context_where_nothing_is_to_come(
    model: Path, raw_tokenizer: Tokenizer
) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = saying(raw_tokenizer, "")
            limit = world.router.max_model_len
            reply = await ask(world, prompt=[[5] * limit], echo=True, logprobs=0, max_tokens=0)
            assert reply["usage"] | {"prompt_tokens_details": None} == {
                "prompt_tokens": limit,
                "completion_tokens": 0,
                "total_tokens": limit,
                "prompt_tokens_details": None,
            }
            for body in ({"max_tokens": 1}, {"max_tokens": 0, "prompt": [[5] * (limit + 1)]}):
                fields = {"model": "tiny", "prompt": [[5] * limit], "echo": True, **body}
                assert (await http.post(PATH, json=fields)).status_code == 400

    run(main())


def test_a_large_body_goes_by_a_helper_all_the_same(model: Path, raw_tokenizer: Tokenizer) -> None:
    async def main() -> None:
        async with gateway_world(model) as world, http_of(world) as http:
            world.router.answer = saying(raw_tokenizer, "one", "two")
            large = {"user": "x" * (1 << 17), "echo": True, "logprobs": 1, "best_of": 2, "prompt_logprobs": 0}
            body = json.dumps({"model": "tiny", "prompt": "Hello you", **large})
            reply = await http.post(PATH, content=body)
            [choice] = reply.json()["choices"]
            assert choice["text"] == "Hello youtwo" and len(choice["logprobs"]["tokens"]) > 2
            assert choice["prompt_logprobs"][0] is None

    run(main())
