"""Adapters behind our shell: two engines of vLLM's under the three actions, against one vLLM that is asked in
its own words. ``sql`` is the same in both engines, ``poet`` is not."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from microserve.protocol.bus.curve import create_mesh_keys
from microserve.protocol.messages.engine import Finished
from microserve.protocol.messages.engine_info import LORA
from microserve.protocol.messages.kv.kv_decoding import decode_batch
from microserve.protocol.messages.kv.kv_events import BlockStored
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.model.tiny_adapter import make_tiny_adapter
from tests.support.engine.model.tiny_model import make_tiny_model
from tests.support.engine_conformance.engine_process import EngineProcess, Launch
from tests.support.engine_conformance.pair import Pair
from tests.support.engine_conformance.relay import fresh
from tests.support.engine_conformance.wire_client import RefusedError, WireClient

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]

SETTINGS = {
    "bus.liveness": "20",
    "engine.backend": "vllm",
    "engine.max_model_len": "512",
    "engine.max_num_seqs": "4",
    "kvcache.block_size": "32",
    "kvcache.checksums": "true",
    "model.dtype": "float32",
    "vllm.kv_cache_mb": "16",
    "vllm.enforce_eager": "true",
}
ALONE = """
import json, sys
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    model, adapters, asked = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.stdin.read())
    llm = LLM(model, dtype="float32", block_size=32, max_model_len=512, max_num_seqs=4, enforce_eager=True,
              kv_cache_memory_bytes=16 << 20, enable_prefix_caching=True, max_num_batched_tokens=512,
              enable_lora=True, max_loras=2, max_lora_rank=8)
    loras = {name: LoRARequest(name, n, path) for n, (name, path) in enumerate(adapters.items(), 1)}
    for name, tokens in asked:
        params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
        prompt, lora = {"prompt_token_ids": tokens}, loras.get(name)
        said = llm.generate(prompt, params, use_tqdm=False, lora_request=lora)
        print("ANSWER", json.dumps(list(said[0].outputs[0].token_ids)))
"""
GREEDY = SamplingParams(max_tokens=10, temperature=0.0, ignore_eos=True)
BASE, SQL, POET = "", "sql", "poet"
LENGTHS = (64, 97, 130)


def prompt_of(length: int) -> list[int]:
    return [20 + (7 * place + length) % 200 for place in range(length)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    }
    return make_tiny_model(directory / "tiny", **sizes)


@pytest.fixture(scope="module")
def adapters(model: Path) -> dict[str, Path]:
    names = ("sql", "poet", "poet-2")
    return {
        name: make_tiny_adapter(model.parent / name, model, seed=seed) for seed, name in enumerate(names, 1)
    }


@pytest.fixture(scope="module")
def alone(model: Path, adapters: dict[str, Path], vllm_python: Path) -> dict[tuple[str, int], list[int]]:
    """vLLM's own tokens, by adapter and length."""
    asked = [(name, length) for name in (BASE, SQL, POET) for length in LENGTHS]
    ran = subprocess.run(
        [vllm_python, "-c", ALONE, model, json.dumps({name: str(adapters[name]) for name in (SQL, POET)})],
        input=json.dumps([(name, prompt_of(length)) for name, length in asked]),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    answers = [line.removeprefix("ANSWER ") for line in ran.stdout.splitlines() if line.startswith("ANSWER ")]
    assert len(answers) == len(asked), ran.stderr[-3000:]
    return dict(zip(asked, map(json.loads, answers), strict=True))


@pytest.fixture(scope="module")
def launch(model: Path, vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Launch:
    keys = create_mesh_keys(tmp_path_factory.mktemp("keys"))
    command = f"{sys.executable} -m microserve.services.command.main"
    return Launch(model, keys, command, "", {**SETTINGS, "vllm.python": str(vllm_python)})


@pytest.fixture(scope="module")
def pair(
    launch: Launch, adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    pair = Pair(launch, tmp_path_factory.mktemp("pair"))
    own = {"engine-a": "poet", "engine-b": "poet-2"}
    started = [
        EngineProcess.start(launch, name, pair.directory, model__adapters=_table(adapters, {POET: poet}))
        for name, poet in own.items()
    ]
    pair.a, pair.b = started
    try:
        asyncio.run(pair._await(*started))
        yield pair
    finally:
        pair.stop()


def _table(adapters: dict[str, Path], more: dict[str, str]) -> str:
    named = {SQL: "sql", **more}
    return "{" + ", ".join(f'{name} = "{adapters[directory]}"' for name, directory in named.items()) + "}"


async def ask(
    client: WireClient, tokens: list[int], adapter: str, salt: str = ""
) -> tuple[list[int], Finished]:
    request_id = fresh("ask")
    await client.start_generate(request_id, 0, GREEDY, tokens, adapter=adapter, salt=salt)
    stream = await client.finished(request_id)
    assert stream.finished is not None
    return list(stream.token_ids), stream.finished


def test_the_answers_differ_by_adapter(alone: dict[tuple[str, int], list[int]]) -> None:
    for length in LENGTHS:
        assert len({tuple(alone[name, length]) for name in (BASE, SQL, POET)}) == 3


def test_a_stream_is_vllms_own_and_finds_no_others_kv(
    pair: Pair, alone: dict[tuple[str, int], list[int]]
) -> None:
    async def run() -> None:
        async with pair.connect() as (client, _):
            for turn in range(2):
                for length in LENGTHS:
                    for name in (BASE, SQL, POET):
                        tokens, finished = await ask(client, prompt_of(length), name, "cold or cached")
                        assert tokens == alone[name, length], (turn, length, name)
                        cached = finished.usage.cached_tokens
                        assert cached == (0 if turn == 0 else (length - 1) // 32 * 32), (turn, length, name)

    asyncio.run(run())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("first_token", [False, True])
@pytest.mark.parametrize("adapter", [BASE, SQL])
def test_a_prompt_of_two_engines_is_answered_as_by_one(
    pair: Pair, alone: dict[tuple[str, int], list[int]], length: int, first_token: bool, adapter: str
) -> None:
    async def run() -> None:
        async with pair.connect() as (sender, receiver):
            tokens, salt, request_id = prompt_of(length), fresh("relay"), fresh("request")
            with_it: dict[str, Any] = {"adapter": adapter, "salt": salt}
            grant = await receiver.prep_recv(request_id, length, tokens, **with_it)
            assert grant.matched == 0
            sampling = GREEDY if first_token else None
            sent = await sender.remote_send(
                request_id, 0, length, grant, tokens, sampling=sampling, **with_it
            )
            await receiver.start_generate(
                *(request_id, length, GREEDY, None),
                grant=grant,
                await_first=first_token,
                numerics=sender.info.numerics.name,
                **with_it,
            )
            stream = await receiver.finished(request_id)
            first = [sent.first_token] if first_token else []
            assert [*first, *stream.token_ids] == alone[adapter, length]
            assert sent.sent == length and sent.computed == length
            # Neither side keeps it under another name.
            for client in (sender, receiver):
                for other in {BASE, SQL} - {adapter}:
                    _, finished = await ask(client, tokens, other, salt)
                    assert finished.usage.cached_tokens == 0

    asyncio.run(run())


def test_what_is_committed_is_the_adapters_alone(pair: Pair, alone: dict[tuple[str, int], list[int]]) -> None:
    async def run() -> None:
        async with pair.connect() as (sender, receiver):
            tokens, salt, request_id = prompt_of(97), fresh("commit"), fresh("request")
            grant = await receiver.prep_recv(request_id, 96, tokens, adapter=SQL, salt=salt)
            await sender.remote_send(request_id, 0, 96, grant, tokens, adapter=SQL, salt=salt)
            assert await receiver.commit(request_id, grant, numerics=sender.info.numerics.name) == 96
            for name, cached in ((BASE, 0), (SQL, 96)):
                answer, finished = await ask(receiver, tokens, name, salt)
                assert answer == alone[name, 97] and finished.usage.cached_tokens == cached

    asyncio.run(run())


def test_kv_of_another_revision_is_refused_with_both(pair: Pair) -> None:
    async def run() -> None:
        async with pair.connect() as (sender, receiver):
            ours, theirs = (
                next(str(each) for each in client.info.adapters if each.name == POET)
                for client in (sender, receiver)
            )
            assert ours != theirs and sender.info.does(LORA)
            tokens, request_id = prompt_of(97), fresh("request")
            grant = await receiver.prep_recv(request_id, 96, tokens, adapter=POET)
            for adapter, said in ((POET, ours), (SQL, f"{SQL}@"), (BASE, "none")):
                with pytest.raises(RefusedError) as caught:
                    await sender.remote_send(fresh("send"), 0, 96, grant, tokens, adapter=adapter)
                assert caught.value.code == "transfer_failed"
                assert f"{said}" in caught.value.detail and theirs in caught.value.detail
            with pytest.raises(RefusedError) as caught:
                await receiver.start_generate(request_id, 96, GREEDY, None, grant=grant, adapter=SQL)
            assert (caught.value.code, caught.value.field) == ("invalid_request", "adapter")
            await receiver.release(request_id, grant)

    asyncio.run(run())


def test_events_tell_of_the_adapter(pair: Pair) -> None:
    async def run() -> None:
        async with pair.connect() as (client, _):
            tokens = prompt_of(97)
            await ask(client, tokens, SQL, fresh("events"))
            named: list[BlockStored] = []
            async with asyncio.timeout(30):
                while not named:  # vLLM's events come by a way of their own
                    _, payload = await client.snapshot()
                    events = decode_batch(payload).events
                    named = [each for each in events if isinstance(each, BlockStored) and each.lora_name]
            assert {each.lora_name for each in named} <= {SQL, POET}
            assert all(each.lora_id and each.extra_keys for each in named)

    asyncio.run(run())


@pytest.mark.parametrize(
    ("spoilt", "told"),
    [
        ("no config", "adapter_config.json"),
        ("of another kind", "'LOHA'"),
        ("no weights", "adapter_model.safetensors"),
        ("of another model", "in_features 64, the model's has 128"),
    ],
)
def test_an_adapter_that_cannot_be_served_ends_the_start(
    launch: Launch, model: Path, tmp_path: Path, spoilt: str, told: str
) -> None:
    directory = make_tiny_adapter(tmp_path / "adapter", model, seed=5)
    config = directory / "adapter_config.json"
    if spoilt == "no config":
        config.unlink()
    elif spoilt == "of another kind":
        config.write_text(json.dumps(json.loads(config.read_text()) | {"peft_type": "LOHA"}))
    elif spoilt == "no weights":
        (directory / "adapter_model.safetensors").unlink()
    else:
        other = make_tiny_model(
            tmp_path / "other", num_hidden_layers=1, hidden_size=64, num_attention_heads=4
        )
        make_tiny_adapter(directory, other)
    engine = EngineProcess.start(launch, "engine-c", tmp_path, model__adapters=f'{{odd = "{directory}"}}')
    try:
        engine.process.wait(timeout=300)
        said = engine.log.read_text()
        assert engine.process.poll() not in (None, 0)
        assert "model.adapters.odd" in said and told in said, said[-3000:]
    finally:
        engine.stop()
