"""A ``vllm serve`` that somebody else runs, scripted: what it is asked, and what becomes of what it says."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError, InvalidInterval, MeshError, QueueFull, UnsupportedAction
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.request.sampling import Grammar, SamplingParams
from microserve.protocol.settings.sources import load_settings
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.kind import EngineKind
from microserve.services.engine.vllm.serve.core import ServedCore
from microserve.services.engine.vllm.serve.http import NotAnswered, Server
from microserve.services.engine.vllm.serve.served import Served
from microserve.services.engine.vllm.serve.service import Facts, facts_of, layout_of, require_tokens
from tests.services.engine.vllm.serve.scripted import MODEL, VOCAB, ScriptedServe, tokens_of

pytestmark = pytest.mark.slow

ROUTER = b"router"
GREEDY = SamplingParams(max_tokens=4, temperature=0.0)


class Engine:
    """The core without a shell, and a router's view of what it says."""

    def __init__(self, scripted: ScriptedServe, *, max_waiting: int = 8) -> None:
        layout = KvLayout(
            MODEL, num_layers=1, num_blocks=8, block_size=32, num_kv_heads=1, head_dim=64, dtype="bfloat16"
        )
        self.core = ServedCore(
            Served(Server(scripted.url), MODEL),
            layout,
            engine_id="e",
            incarnation=1,
            kind=EngineKind("vllm-serve", "0.32.0", ()),
            numerics=Numerics("vllm-serve-0.32.0"),
            limits=Limits(256, VOCAB, 8, max_waiting, frozenset({2})),
            max_num_seqs=1,
        )
        self.replies: list[wire.EngineReply] = []
        self.deltas: list[wire.Delta] = []
        self._said = asyncio.Event()
        self.core.on_output = self._take

    def _take(self) -> None:
        outbox, _ = self.core.take_output()
        self.replies += [reply for _, reply in outbox.replies]
        self.deltas += [delta for _, delta in outbox.deltas]
        self._said.set()

    def start(
        self, tokens: list[int], params: SamplingParams = GREEDY, **fields: Any
    ) -> wire.Accepted | None:
        message = wire.StartGenerate(1, "r", 0, params, 30.0, **fields)
        return self.core.actions.start_generate(ROUTER, message, tokens, self.core.clock())

    async def until(self, is_so: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not is_so():
                self._said.clear()
                await self._said.wait()

    async def finished(self) -> wire.Finished:
        await self.until(lambda: bool(self.deltas) and self.deltas[-1].finished is not None)
        found = self.deltas[-1].finished
        assert found is not None
        return found

    @property
    def token_ids(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.token_ids]


Test = Callable[[ScriptedServe, Engine], Awaitable[None]]


@asynccontextmanager
async def running(**script: Any) -> AsyncIterator[tuple[ScriptedServe, Engine]]:
    async with ScriptedServe(**script).run() as scripted:
        engine = Engine(scripted)
        try:
            yield scripted, engine
        finally:
            engine.core.close()


def test_tokens_in_tokens_out() -> None:
    async def go() -> None:
        async with running() as (scripted, engine):
            engine.start([5, 6], SamplingParams(max_tokens=5, temperature=0.0, logprobs=2), salt="tenant")
            finished = await engine.finished()
            assert engine.replies == [wire.Accepted(1)]
            assert engine.token_ids == tokens_of([5, 6], 5)
            assert [delta.offset for delta in engine.deltas] == [0, 1, 2, 3, 4]
            assert (finished.reason, finished.usage.output_tokens) == ("length", 5)
            rated = engine.deltas[0].logprobs[0]
            token = engine.token_ids[0]
            assert rated.logprob == -3.0  # the two likeliest are others
            assert rated.top == [(token + 1, -1.0), (token + 2, -2.0)]
            [body] = scripted.asked
            assert (body["token_ids"], body["model"], body["cache_salt"]) == ([5, 6], MODEL, "tenant")
            assert (body["stream"], body["sampling_params"]["logprobs"]) == (True, 3)
            assert not engine.core.state.records and not engine.core.is_busy

    asyncio.run(go())


def test_a_stop_token_ends_it_and_is_named() -> None:
    async def go() -> None:
        async with running() as (_, engine):
            third = tokens_of([5], 3)[2]
            engine.start([5], SamplingParams(max_tokens=9, temperature=0.0, stop_token_ids=(third,)))
            finished = await engine.finished()
            assert (finished.reason, finished.stop_token_id) == ("stop", third)
            assert engine.token_ids == tokens_of([5], 3)

    asyncio.run(go())


def test_a_continued_stream_asks_for_what_is_left() -> None:
    async def go() -> None:
        async with running() as (scripted, engine):
            engine.start([5, 6, 7], SamplingParams(max_tokens=5, temperature=0.0), num_output_tokens=2)
            finished = await engine.finished()
            assert engine.deltas[0].offset == 2 and finished.usage.prompt_tokens == 1
            assert scripted.asked[0]["sampling_params"]["max_tokens"] == 3

    asyncio.run(go())


def test_what_needs_kv_is_refused_with_a_word_for_people() -> None:
    async def go() -> None:
        async with running() as (scripted, engine):
            actions, now = engine.core.actions, engine.core.clock()
            with pytest.raises(UnsupportedAction, match=r"a stock vllm serve\) cannot receive KV"):
                actions.prep_recv(ROUTER, wire.PrepRecv(1, "r", 2, 30.0), [1, 2], now)
            with pytest.raises(UnsupportedAction, match="cannot receive KV"):
                actions.commit(ROUTER, wire.Commit(1, "r", "g", 30.0), now)
            with pytest.raises(UnsupportedAction, match="cannot build on another engine's KV"):
                engine.start([1, 2], grant_id="g")
            with pytest.raises(UnsupportedAction, match="cannot rate the tokens of a prompt"):
                engine.start([1], SamplingParams(max_tokens=1, prompt_logprobs=1))
            with pytest.raises(InvalidInterval):
                actions.start_generate(ROUTER, wire.StartGenerate(1, "r", 1, GREEDY, 30.0), [1, 2], now)
            with pytest.raises(MeshError, match="maximum context length is 256"):
                engine.start([1] * 256)
            assert not engine.core.state.records and scripted.asked == []

    asyncio.run(go())


@pytest.mark.parametrize(
    ("status", "body", "code", "detail"),
    [
        (400, {"error": {"message": "no such thing", "param": "seed"}}, "invalid_request", "no such thing"),
        (422, {"detail": "odd"}, "invalid_request", "odd"),
        (429, {"error": {"message": "full"}}, "capacity", "full"),
        (500, {"error": {"message": "broken"}}, "internal", "vllm serve answers 500: broken"),
        (404, {"error": {"message": "no model"}}, "internal", "vllm serve answers 404: no model"),
    ],
)
def test_a_refusal_is_its_callers(status: int, body: dict[str, Any], code: str, detail: str) -> None:
    async def go() -> None:
        async with running(refusals=[(status, body)]) as (_, engine):
            engine.start([5])
            await engine.until(lambda: bool(engine.replies))
            [failed] = engine.replies
            assert isinstance(failed, wire.Failed)
            assert (failed.code, failed.detail) == (code, detail)
            assert not engine.core.state.records
            engine.start([5])  # and the next one is served
            assert (await engine.finished()).reason == "length"

    asyncio.run(go())


def test_a_stream_that_breaks_off_is_an_engine_that_is_lost() -> None:
    async def go() -> None:
        async with running(breaks_after=2) as (_, engine):
            engine.start([5])
            finished = await engine.finished()
            assert (finished.reason, finished.code) == ("error", "engine_lost")
            assert engine.token_ids == tokens_of([5], 2)  # what came is not lost

    asyncio.run(go())


def test_who_aborts_is_missed_by_the_server() -> None:
    async def go() -> None:
        async with running(holds_after=1) as (scripted, engine):
            engine.start([5])
            await engine.until(lambda: bool(engine.deltas))
            engine.core.actions.abort(ROUTER, wire.Abort(2, "r"), engine.core.clock())
            assert not engine.core.is_busy and not engine.core.state.records
            async with asyncio.timeout(30):
                while not scripted.num_left:
                    await asyncio.sleep(0.01)

    asyncio.run(go())


def test_a_request_whose_time_is_over_ends_and_a_full_engine_says_so() -> None:
    async def go() -> None:
        async with ScriptedServe(holds_after=0).run() as scripted:
            engine = Engine(scripted, max_waiting=1)
            now = engine.core.clock()
            for name in ("a", "b"):
                message = wire.StartGenerate(1, name, 0, GREEDY, 5.0)
                engine.core.actions.start_generate(ROUTER, message, [1], now)
            assert (engine.core.load().num_running, engine.core.load().num_waiting) == (1, 1)
            with pytest.raises(QueueFull):
                engine.start([1])
            await engine.until(lambda: len(engine.replies) == 2)
            engine.core.state.expire(now + 6.0)
            engine.core.on_output()
            codes = {delta.finished.code for delta in engine.deltas if delta.finished}
            assert codes == {"deadline_exceeded"} and not engine.core.is_busy
            engine.core.close()

    asyncio.run(go())


def test_a_grammar_is_said_in_vllms_words() -> None:
    async def go() -> None:
        async with running() as (scripted, engine):
            engine.start([5], SamplingParams(max_tokens=2, grammar=Grammar(kind="regex", text="a+")))
            await engine.finished()
            assert scripted.asked[0]["sampling_params"]["structured_outputs"] == {"regex": "a+"}

    asyncio.run(go())


# --- at the start ----------------------------------------------------------------------------------


def test_a_server_says_what_it_is() -> None:
    async def go() -> None:
        async with ScriptedServe().run() as scripted:
            facts = await facts_of(Server(scripted.url), "other name")
            assert facts == Facts(MODEL, "0.32.0", 256, 32, 40)
            await require_tokens(Served(Server(scripted.url), MODEL), Server(scripted.url))
            scripted.models.append({"id": "adapter", "parent": MODEL, "max_model_len": None})
            assert (await facts_of(Server(scripted.url), "other name")).model == MODEL
            scripted.models.append({"id": "second", "max_model_len": 8})
            with pytest.raises(ConfigError, match=r"has tiny, second, not 'other name'"):
                await facts_of(Server(scripted.url), "other name")
            assert (await facts_of(Server(scripted.url), "second")).max_model_len == 8

    asyncio.run(go())


def test_a_server_that_cannot_be_it_is_a_wrong_setting() -> None:
    async def go() -> None:
        async with ScriptedServe(refusals=[(404, {"detail": "Not Found"})]).run() as scripted:
            with pytest.raises(ConfigError, match=r"generate cannot be used: .*404"):
                await require_tokens(Served(Server(scripted.url), MODEL), Server(scripted.url))
            with pytest.raises(ConfigError, match=r"is no vllm serve|answers 404"):
                await facts_of(Server(f"{scripted.url}/elsewhere"), MODEL)
            url = scripted.url
        with pytest.raises(NotAnswered):
            await facts_of(Server(url), MODEL)

    asyncio.run(go())


def test_its_blocks_are_the_servers_and_there_is_no_heap() -> None:
    settings = load_settings(overrides=["engine.backend=vllm-serve", "vllm.url=http://127.0.0.1:1"])
    config = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 64}
    layout = layout_of(settings, config, Facts("m", "1", 64, 32, 40), "m")
    assert (layout.block_size, layout.num_blocks, layout.head_dim, layout.revision) == (32, 40, 16, "")
    assert (settings.heap, settings.heaps) == ("", [])
    with pytest.raises(ConfigError, match="no num_hidden_layers"):
        layout_of(settings, {"num_attention_heads": 4}, Facts("m", "1", 64, 32, 40), "m")
