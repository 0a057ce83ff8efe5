"""What cannot be done is refused: by its code, naming the field that is wrong, and nothing stays of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from microserve.protocol.bus.codec import encode_tokens
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.engine_info import COMMIT, FIRST_TOKEN, PREP_RECV, REMOTE_SEND
from microserve.protocol.messages.kv.grant import Grant
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine_conformance.answers import GREEDY, make_prompt
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import check_relay, fresh
from tests.support.engine_conformance.wire_client import RefusedError

LENGTH = 20
TTL_S = 60.0


@dataclass(frozen=True)
class Case:
    """One call that is refused, of a prompt of ``LENGTH`` tokens."""

    build: Callable[[int], wire.EngineRequest]
    code: str
    field: str | None
    prompt: tuple[bytes, ...] = ()
    """The bulk frames."""


def prep(request_id: str = "bad", end: int = LENGTH, ttl_s: float = TTL_S) -> Callable[[int], wire.PrepRecv]:
    return lambda call: wire.PrepRecv(call, request_id, end, ttl_s)


def start(
    begin: int = 0,
    *,
    request_id: str = "bad",
    sampling: SamplingParams = GREEDY,
    ttl_s: float = TTL_S,
    grant_id: str | None = None,
    await_first: bool = False,
    num_output_tokens: int = 0,
) -> Callable[[int], wire.StartGenerate]:
    return lambda call: wire.StartGenerate(
        call, request_id, begin, sampling, ttl_s, grant_id, await_first, num_output_tokens
    )


WORDS = encode_tokens(range(20, 20 + LENGTH))
PROMPT = (WORDS,)
CASES: dict[str, Case] = {
    "prep: no id": Case(prep(""), "invalid_request", "request_id", PROMPT),
    "prep: an endless id": Case(prep("x" * 129), "invalid_request", "request_id", PROMPT),
    "prep: end behind the prompt": Case(prep(end=LENGTH + 1), "invalid_interval", "end", PROMPT),
    "prep: end before the prompt": Case(prep(end=-LENGTH - 1), "invalid_interval", "end", PROMPT),
    "prep: no time": Case(prep(ttl_s=0.0), "invalid_request", "ttl_s", PROMPT),
    "prep: time that is no number": Case(prep(ttl_s=float("nan")), "invalid_request", "ttl_s", PROMPT),
    "prep: no prompt": Case(prep(), "unknown_request", "request_id"),
    "prep: an empty prompt": Case(prep(end=0), "invalid_request", "tokens", (b"",)),
    "prep: a token that does not exist": Case(prep(end=1), "invalid_request", "tokens", (b"\xff" * 4,)),
    "prep: half a token": Case(prep(end=1), "protocol_violation", None, (WORDS[:-1],)),
    "start: no id": Case(start(request_id=""), "invalid_request", "request_id", PROMPT),
    "start: no time": Case(start(ttl_s=-1.0), "invalid_request", "ttl_s", PROMPT),
    "start: no prompt": Case(start(), "unknown_request", "request_id"),
    "start: begin without a grant": Case(start(1), "invalid_interval", "begin", PROMPT),
    "start: begin behind the prompt": Case(start(LENGTH + 1), "invalid_interval", "begin", PROMPT),
    "start: a grant that is not there": Case(
        start(1, grant_id="none"), "unknown_request", "grant_id", PROMPT
    ),
    "start: all is output": Case(
        start(num_output_tokens=LENGTH), "invalid_request", "num_output_tokens", PROMPT
    ),
    "start: less than no output": Case(
        start(num_output_tokens=-1), "invalid_request", "num_output_tokens", PROMPT
    ),
    "start: all has been said": Case(
        start(num_output_tokens=GREEDY.max_tokens), "invalid_request", "num_output_tokens", PROMPT
    ),
    "commit: nothing there": Case(
        lambda call: wire.Commit(call, "bad", "none", TTL_S), "unknown_request", "grant_id"
    ),
}


@pytest.mark.parametrize("name", CASES)
async def test_a_call_is_refused(pair: Pair, name: str) -> None:
    case = CASES[name]
    async with pair.connect() as (_, b):
        with pytest.raises(RefusedError) as refused:
            await b.ask(object, case.build, *case.prompt)
        assert (refused.value.code, refused.value.field) == (case.code, case.field), refused.value
        assert refused.value.detail


async def test_a_prompt_longer_than_the_model_bears_is_refused(pair: Pair) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, b.info.max_model_len + 1, "long")
        for length in (b.info.max_model_len, len(tokens)):
            with pytest.raises(RefusedError) as refused:
                await b.start_generate(fresh("long"), 0, GREEDY, tokens[:length])
            assert refused.value.code == "prompt_too_long"


@pytest.mark.parametrize("position", ["alone", "first", "last"])
async def test_a_token_outside_of_the_vocabulary_is_refused(pair: Pair, position: str) -> None:
    async with pair.connect() as (_, b):
        tokens = make_prompt(b.info, 5, "vocabulary")
        wrong = b.info.vocab_size
        tokens = {"alone": [wrong], "first": [wrong, *tokens], "last": [*tokens, wrong]}[position]
        with pytest.raises(RefusedError) as refused:
            await b.start_generate(fresh("vocabulary"), 0, GREEDY, tokens)
        assert (refused.value.code, refused.value.field) == ("invalid_request", "tokens")


@pytest.mark.sample
async def test_what_does_not_fit_the_grant_is_refused_and_the_grant_lives(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        block = b.info.block_size
        tokens, request_id = make_prompt(b.info, 2 * block, "fits"), fresh("fits")
        end = block
        grant = await b.prep_recv(request_id, end, tokens)

        async def refusal(begin: int, *, await_first: bool = False) -> tuple[str, str | None]:
            with pytest.raises(RefusedError) as refused:
                await b.start_generate(request_id, begin, GREEDY, None, grant=grant, await_first=await_first)
            return refused.value.code, refused.value.field

        assert await refusal(end - 1) == ("invalid_interval", "begin")
        assert await refusal(end + 1) == ("invalid_interval", "begin")
        assert await refusal(end, await_first=True) == ("invalid_interval", "await_first")
        await a.remote_send(request_id, 0, end, grant, tokens)
        await b.start_generate(request_id, end, GREEDY, None, grant=grant, numerics=a.info.numerics.name)
        assert len((await b.finished(request_id)).token_ids) == GREEDY.max_tokens


async def test_a_first_token_is_sampled_at_the_prompt_s_end_alone(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens, request_id = make_prompt(b.info, 2 * b.info.block_size, "samples"), fresh("samples")
        grant = await b.prep_recv(request_id, len(tokens), tokens)

        async def refusal(grant: Grant, end: int, sampling: SamplingParams) -> tuple[str, str | None]:
            with pytest.raises(RefusedError) as refused:
                await a.remote_send(fresh("samples"), 0, end, grant, tokens, sampling=sampling)
            return refused.value.code, refused.value.field

        if a.info.does(FIRST_TOKEN):
            assert await refusal(grant, b.info.block_size, GREEDY) == ("invalid_interval", "end")
            wrong = SamplingParams(top_p=2.0)
            assert await refusal(grant, len(tokens), wrong) == ("invalid_request", "top_p")
        else:
            assert (await refusal(grant, len(tokens), GREEDY))[1] == "sampling"
        await b.release(request_id, grant)


async def test_a_send_that_begins_between_two_places_where_it_may_is_refused(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        if a.info.split_tokens == 1:
            pytest.skip("the engine declares that a send may begin anywhere")
        tokens, request_id = make_prompt(b.info, 3 * b.info.block_size, "between"), fresh("between")
        grant = await b.prep_recv(request_id, len(tokens), tokens)
        with pytest.raises(RefusedError) as refused:
            await a.remote_send(request_id, a.info.split_tokens + 1, len(tokens), grant, tokens)
        assert (refused.value.code, refused.value.field) == ("invalid_interval", "begin")
        await b.release(request_id, grant)


async def test_what_an_engine_does_not_declare_it_refuses(pair: Pair) -> None:
    async with pair.connect() as (a, b):
        tokens = make_prompt(a.info, a.info.block_size, "declares")
        if all(b.info.does(each) for each in (PREP_RECV, REMOTE_SEND, COMMIT)):
            await check_relay(a, b, tokens, len(tokens))
            return
        calls: dict[str, Callable[[int], wire.EngineRequest]] = {
            PREP_RECV: prep(end=len(tokens)),
            COMMIT: lambda call: wire.Commit(call, "bad", "none", TTL_S),
        }
        for ability, build in calls.items():
            if not b.info.does(ability):
                with pytest.raises(RefusedError) as refused:
                    await b.ask(object, build, encode_tokens(tokens))
                assert refused.value.code == "invalid_request"


async def test_a_key_without_the_right_is_refused(pair: Pair) -> None:
    """An index may look; what computes is not its to ask for."""
    async with pair.connect(), pair.bus("index") as readers:
        reader = pair.client(readers, pair.b)
        await reader.hello(credit=0)
        await reader.stats()
        await reader.snapshot()
        for build in (
            prep(),
            start(),
            lambda call: wire.Abort(call, "x"),
            CASES["commit: nothing there"].build,
        ):
            with pytest.raises(RefusedError) as refused:
                await reader.ask(object, build, WORDS)
            assert refused.value.code == "not_permitted"
