"""Probes of the client itself (raw answers, time limits, retries, typed errors), of models, and of what there
is not."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from tests.gateway.probes.probe import KEY, SAYS, USER, Bench, probe

ASKED: Any = {"model": "tiny", "messages": USER}


@probe("`with_raw_response`, and its headers")
def raw(bench: Bench) -> None:
    reply = bench.client.chat.completions.with_raw_response.create(**ASKED)
    assert reply.headers["x-request-id"] and reply.headers["x-microserve-strategy"] == "auto"
    parsed = reply.parse()
    assert parsed.choices[0].message.content == SAYS and parsed._request_id == reply.headers["x-request-id"]


@probe("`with_streaming_response`")
def streaming(bench: Bench) -> None:
    with bench.client.chat.completions.with_streaming_response.create(**ASKED, stream=True) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        assert [line for line in reply.iter_lines() if line][-1] == "data: [DONE]"


@probe("a stream that is closed early")
def closed_early(bench: Bench) -> None:
    with bench.chat(stream=True) as stream:
        next(iter(stream))
    assert bench.chat().choices


@probe("`AsyncOpenAI`, many at a time")
def concurrent(bench: Bench) -> None:
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=bench.client.base_url, api_key=KEY) as client:
            replies = await asyncio.gather(*(client.chat.completions.create(**ASKED) for _ in range(8)))
            assert {reply.choices[0].message.content for reply in replies} == {SAYS}
            stream = await client.chat.completions.create(**ASKED, stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == SAYS

    asyncio.run(main())


@probe("`base_url` with and without a slash")
def slash(bench: Bench) -> None:
    for end in ("/v1", "/v1/"):
        with openai.OpenAI(base_url=f"{bench.living.address}{end}", api_key=KEY) as client:
            assert client.chat.completions.create(**ASKED).choices


@probe("`base_url` without `/v1`", refused=404)
def no_version(bench: Bench) -> None:
    bench.client.with_options(base_url=bench.living.address).chat.completions.create(**ASKED)


@probe("`organization` and `project`")
def organization(bench: Bench) -> None:
    with openai.OpenAI(
        base_url=bench.client.base_url, api_key=KEY, organization="org-1", project="proj-1"
    ) as client:
        assert client.chat.completions.create(**ASKED).choices


@probe("`extra_headers`: a request's id, a strategy")
def headers(bench: Bench) -> None:
    reply = bench.client.chat.completions.with_raw_response.create(
        **ASKED, extra_headers={"x-request-id": "probe-1", "x-microserve-strategy": "balanced"}
    )
    assert reply.headers["x-request-id"] == "probe-1" and bench.asked().message.strategy == "balanced"


@probe("a wrong key", refused=401)
def wrong_key(bench: Bench) -> None:
    with pytest.raises(openai.AuthenticationError):
        bench.client.with_options(api_key="other").models.list()
    bench.client.with_options(api_key="other").chat.completions.create(**ASKED)


@probe("a model that is not here", refused=404, param="model")
def no_model(bench: Bench) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        bench.chat(model="gpt-4o")
    assert caught.value.code == "model_not_found"
    bench.chat(model="gpt-4o")


@probe("a retry behind a 429 and a 503 (`max_retries`)")
def retries(bench: Bench) -> None:
    bench.fails[:] = ["queue_full", "no_engines"]
    before = len(bench.living.served())
    reply = bench.client.with_options(max_retries=2).chat.completions.create(**ASKED)
    assert reply.choices and len(bench.living.served()) == before + 3 and not bench.fails


@probe("a 429 (`RateLimitError`)", refused=429)
def rate_limit(bench: Bench) -> None:
    bench.fails[:] = ["queue_full"]
    bench.chat()


@probe("a 503 (`InternalServerError`)", refused=503)
def unavailable(bench: Bench) -> None:
    bench.fails[:] = ["no_engines"]
    bench.chat()


@probe("`timeout`")
def timeout(bench: Bench) -> None:
    bench.fails[:] = ["silence"]
    with pytest.raises(openai.APITimeoutError):
        bench.client.with_options(timeout=0.2).chat.completions.create(**ASKED)
    assert bench.client.with_options(timeout=60.0).chat.completions.create(**ASKED).choices


@probe("a body that is not JSON", refused=400)
def no_json(bench: Bench) -> None:
    bench.client.post("/chat/completions", cast_to=object, content=b"{", options={})


@probe("`models.list` and `models.retrieve`")
def models(bench: Bench) -> None:
    [card] = list(bench.client.models.list())
    assert card == bench.client.models.retrieve("tiny")
    assert (card.id, card.object, card.owned_by) == ("tiny", "model", "microserve")
    assert card.model_extra is not None and card.model_extra["max_model_len"] == 512


@probe("`models.retrieve` of another", refused=404, param="model")
def no_such_model(bench: Bench) -> None:
    bench.client.models.retrieve("gpt-4o")


@probe("`embeddings.create`", refused=404)
def embeddings(bench: Bench) -> None:
    bench.client.embeddings.create(model="tiny", input="hi")


@probe("`moderations.create`", refused=404)
def moderations(bench: Bench) -> None:
    bench.client.moderations.create(input="hi")


@probe("`images.generate`", refused=404)
def images(bench: Bench) -> None:
    bench.client.images.generate(model="tiny", prompt="hi")


@probe("`audio.speech.create` and `audio.transcriptions.create`", refused=404)
def speech(bench: Bench) -> None:
    with pytest.raises(openai.NotFoundError):
        bench.client.audio.transcriptions.create(model="tiny", file=("a.wav", b"x"))
    bench.client.audio.speech.create(model="tiny", voice="alloy", input="hi")


@probe("`files.list` and `files.create`", refused=404)
def files(bench: Bench) -> None:
    with pytest.raises(openai.NotFoundError):
        bench.client.files.create(file=b"x", purpose="batch")
    bench.client.files.list()


@probe("`batches`, `fine_tuning`, `vector_stores`", refused=404)
def jobs(bench: Bench) -> None:
    with pytest.raises(openai.NotFoundError):
        bench.client.fine_tuning.jobs.list()
    with pytest.raises(openai.NotFoundError):
        bench.client.vector_stores.list()
    bench.client.batches.list()


@probe("`models.delete`", refused=405)
def delete(bench: Bench) -> None:
    bench.client.models.delete("tiny")
