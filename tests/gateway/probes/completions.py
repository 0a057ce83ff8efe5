"""Probes of ``client.completions``: texts and token ids, the older way."""

from __future__ import annotations

from tests.gateway.probes.probe import SAYS, Bench, probe


@probe("`completions.create`")
def plain(bench: Bench) -> None:
    reply = bench.complete()
    assert (reply.object, reply.choices[0].text, reply.choices[0].finish_reason) == (
        "text_completion",
        SAYS,
        "stop",
    )
    assert bench.prompt() == "once" and bench.asked().message.sampling.max_tokens == 16


@probe("several prompts, and `n`")
def prompts(bench: Bench) -> None:
    reply = bench.complete(prompt=["a", "b"], n=2)
    assert [choice.index for choice in reply.choices] == [0, 1, 2, 3]


@probe("token ids as a prompt")
def ids(bench: Bench) -> None:
    bench.complete(prompt=[65, 66])
    assert bench.asked().tokens == [65, 66]
    assert len(bench.complete(prompt=[[65], [66, 67]]).choices) == 2


@probe("an id that is none", refused=400, param="prompt")
def no_id(bench: Bench) -> None:
    bench.complete(prompt=[10_000_000])


@probe("a stream of a completion")
def stream(bench: Bench) -> None:
    chunks = list(bench.complete(stream=True, stream_options={"include_usage": True}))
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == SAYS
    assert chunks[-1].usage.completion_tokens > 0


@probe("`logprobs=2` of a completion")
def logprobs(bench: Bench) -> None:
    found = bench.complete(logprobs=2).choices[0].logprobs
    assert "".join(token for token in found.tokens if not token.startswith("bytes:")) in (
        SAYS,
        "Hello !",
        "Hello!",
    )
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)


@probe("`suffix`", refused=400, param="suffix")
def suffix(bench: Bench) -> None:
    bench.complete(suffix="end")


@probe("`echo=True`")
def echo(bench: Bench) -> None:
    assert bench.complete(echo=True).choices[0].text == "once" + SAYS


@probe("`best_of=2`")
def best_of(bench: Bench) -> None:
    assert [choice.text for choice in bench.complete(best_of=2).choices] == [SAYS]
    assert len(bench.living.served()) >= 2


@probe("`best_of=2` of a stream", refused=400, param="best_of")
def best_of_a_stream(bench: Bench) -> None:
    bench.complete(best_of=2, stream=True)


@probe("tools of a completion", refused=400, param="tools")
def tools(bench: Bench) -> None:
    bench.complete(extra_body={"tools": [{"type": "function", "function": {"name": "f"}}]})


@probe("an empty prompt", refused=400, param="prompt")
def empty(bench: Bench) -> None:
    bench.complete(prompt="")
