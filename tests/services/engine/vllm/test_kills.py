"""kill -9 of each process of a vLLM engine, in every phase: streams go on elsewhere, nothing is left behind,
and the engine comes back and is used again.

One mesh for all of it, as `microserve up` starts it. A phase is caught and held by stopping the worker that
computes; that it still stands is looked at before the kill.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import select
import signal
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from microserve.protocol.messages.engine import EngineLoad
from tests.support.engine_conformance.pair import is_idle, until_load
from tests.support.engine_conformance.wire_client import WireClient
from tests.support.vllm.mesh import ENGINES, PARTS, READY_S, Part, VllmMesh, freeze, mapped, thaw, until
from tests.support.vllm.stream import SERVED_S, WHOLE, Stream, new_prompt, serve, streaming

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1800)]

TINY = {
    "model.dtype": "float32",
    "engine.max_model_len": 1024,
    "engine.max_num_seqs": 8,
    "engine.max_num_batched_tokens": 32,
    "engine.drain_s": 20.0,
    "kvcache.block_size": 32,
    "vllm.kv_cache_mb": 16,
    "vllm.enforce_eager": True,
    "bus.liveness": 20,
}
"""Prompts take many steps. A router is lost after five seconds: the machine may be busy."""
LONG, SHORT = 900, 40
SOME_LAYERS = 8
TRIES = 40
"""A phase that was over before its worker stood is tried again, with another prompt."""


@pytest.fixture(scope="module")
def mesh(vllm_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmMesh]:
    from tests.support.engine.model.tiny_model import make_tiny_model

    directory = tmp_path_factory.mktemp("kills")
    model = make_tiny_model(
        directory / "tiny",
        num_hidden_layers=4,
        hidden_size=128,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    with VllmMesh(model, vllm_python, directory, TINY) as mesh:
        asyncio.run(mesh.count_blocks())
        yield mesh
        if mesh.mesh.supervisor():  # but for a run of single tests, the last one has
            assert mesh.down().stdout == "stopped\n"
        asyncio.run(until(lambda: not mesh.left(), "nothing is left", 60.0))


# --- phases ----------------------------------------------------------------------------------------------


async def loads(clients: dict[str, WireClient]) -> dict[str, EngineLoad]:
    return {engine: (await client.stats()).load for engine, client in clients.items()}


@contextlib.asynccontextmanager
async def sending(mesh: VllmMesh) -> AsyncIterator[tuple[str, str, Stream]]:
    """Sender, receiver, and the stream that waits for what is sent; some layers of it are computed. It stands
    until the sender's worker is thawed or gone."""
    for _ in range(TRIES):
        async with mesh.clients() as clients, streaming(mesh, new_prompt(LONG), "disaggregated") as stream:
            before = await loads(clients)
            while not stream.done.is_set() and not stream.num_pieces:
                now = await loads(clients)
                granting = {each for each in clients if now[each].num_grants}
                moving = {
                    each for each in clients if now[each].progress > before[each].progress + SOME_LAYERS
                }
                if len(granting) == len(moving - granting) == 1:
                    (receiver,), (sender,) = granting, moving - granting
                    worker = mesh.parts(sender)["worker"]
                    freeze(worker)
                    now = await loads(clients)
                    if now[sender].num_running and now[receiver].num_grants and not stream.num_pieces:
                        try:
                            yield sender, receiver, stream
                            return
                        finally:
                            thaw(worker)
                    thaw(worker)
                    break
            async with asyncio.timeout(SERVED_S):
                await stream.done.wait()
            assert stream.outcome == WHOLE
    raise AssertionError("no send was caught under way")


@contextlib.asynccontextmanager
async def decoding(mesh: VllmMesh) -> AsyncIterator[tuple[str, Stream]]:
    """The engine, and its stream, of which the client has some; it stands as above."""
    for _ in range(TRIES):
        async with mesh.clients() as clients, streaming(mesh, new_prompt(SHORT), "data_parallel") as stream:
            await until(lambda: stream.num_pieces >= 3 or stream.done.is_set(), "it is decoded", SERVED_S)
            running = [each for each, load in (await loads(clients)).items() if load.num_running]
            if len(running) == 1:
                worker = mesh.parts(running[0])["worker"]
                freeze(worker)
                load = (await loads(clients))[running[0]]
                if load.num_running and not stream.done.is_set():
                    try:
                        yield running[0], stream
                        return
                    finally:
                        thaw(worker)
                thaw(worker)
            async with asyncio.timeout(SERVED_S):
                await stream.done.wait()
            assert stream.outcome == WHOLE
    raise AssertionError("no stream was caught under way")


# --- and what comes behind -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Life:
    """Of an engine that has been killed, and what has to be another one behind it."""

    engine: str
    incarnations: list[int]
    """All until then."""
    restarts: int
    shared: set[str]
    """Names in /dev/shm."""


async def kill(mesh: VllmMesh, engine: str, part: Part) -> Life:
    """One process, by SIGKILL; returns when all of the engine's are gone."""
    mesh.look()
    parts = mesh.parts(engine)
    assert part in parts
    shared = mapped(parts.values())
    life = Life(engine, mesh.incarnations(engine), mesh.child(engine).restarts, shared)
    with contextlib.ExitStack() as closing:
        handles = [os.pidfd_open(pid) for pid in parts.values()]
        for handle in handles:
            closing.callback(os.close, handle)
        os.kill(parts[part], signal.SIGKILL)
        await until(lambda: len(select.select(handles, [], [], 0)[0]) == len(handles), "all are gone", 60.0)
    return life


async def comes_back(mesh: VllmMesh, life: Life) -> None:
    """Under its supervisor, as a new life, which is used; of the old one there is nothing."""
    engine = life.engine
    (other,) = {*ENGINES} - {engine}
    await until(lambda: mesh.child(engine).restarts > life.restarts, "it is started again")
    names = [Path("/dev/shm", name) for name in life.shared]
    await until(lambda: not any(name.exists() for name in names), "what it had shared is gone", 60.0)
    await until(lambda: mesh.child(engine).state == "ready", "it is ready again")
    await until(lambda: len(mesh.incarnations(engine)) > len(life.incarnations), "the index has it")
    assert mesh.child(other).state == "ready"
    async with asyncio.timeout(READY_S):
        while True:
            stream = await serve(mesh, new_prompt(LONG), "disaggregated")
            assert stream.outcome == WHOLE
            await until(partial(mesh.engines_of, stream.request_id), "its line is written", 60.0)
            if mesh.engines_of(stream.request_id) == {*ENGINES}:
                break
    async with mesh.clients() as clients:
        for client in clients.values():
            await until_load(client, is_idle)
            await until_load(client, lambda load: load.free_blocks == mesh.free_blocks)
    assert len(list(mesh.temporary.glob("microserve-*"))) == len(ENGINES), "the old one's directory is gone"


async def ends(mesh: VllmMesh, stream: Stream) -> None:
    """As if nothing had happened: it is whole, with the text of a run without a fault. What the client had
    before is the beginning of that, once."""
    async with asyncio.timeout(SERVED_S):
        await stream.done.wait()
    undisturbed = await serve(mesh, stream.prompt, "data_parallel")
    assert stream.outcome == undisturbed.outcome == WHOLE
    assert stream.text == undisturbed.text


PHASES = ("start", "idle", "sender", "receiver", "decode", "drain")


SHORT_FORM = {("decode", "core"), ("receiver", "worker")}
"""Each costs a start of vLLM."""


@pytest.mark.parametrize(
    ("phase", "part"),
    [
        pytest.param(*case, marks=() if case in SHORT_FORM else (pytest.mark.slow,))
        for case in itertools.product(PHASES, PARTS)
    ],
)
def test_a_process_is_killed(mesh: VllmMesh, phase: str, part: Part) -> None:
    async def test() -> None:
        await until(lambda: all(mesh.child(engine).state == "ready" for engine in ENGINES), "all serve")
        await PHASE[phase](mesh, part)

    asyncio.run(test())


async def idle(mesh: VllmMesh, part: Part) -> None:
    async with mesh.clients() as clients:
        for client in clients.values():
            await until_load(client, is_idle)
    life = await kill(mesh, "e0", part)
    assert (await serve(mesh, new_prompt(LONG), "disaggregated")).outcome == WHOLE, "by who is left"
    await comes_back(mesh, life)


async def start(mesh: VllmMesh, part: Part) -> None:
    """Another life of it, before it serves."""
    first = await kill(mesh, "e1", "front")
    is_there = lambda: mesh.child("e1").restarts > first.restarts and part in mesh.parts("e1")  # noqa: E731
    await until(is_there, "it is started again")
    assert mesh.child("e1").state == "restarting"
    life = await kill(mesh, "e1", part)
    assert (await serve(mesh, new_prompt(SHORT), "data_parallel")).outcome == WHOLE, "by who is left"
    await comes_back(mesh, life)


async def sender(mesh: VllmMesh, part: Part) -> None:
    async with sending(mesh) as (sender, _, stream):
        life = await kill(mesh, sender, part)
        await ends(mesh, stream)
    await comes_back(mesh, life)


async def receiver(mesh: VllmMesh, part: Part) -> None:
    async with sending(mesh) as (sender, receiver, stream):
        life = await kill(mesh, receiver, part)
        thaw(mesh.parts(sender)["worker"])
        await ends(mesh, stream)
    await comes_back(mesh, life)


async def decode(mesh: VllmMesh, part: Part) -> None:
    async with decoding(mesh) as (engine, stream):
        life = await kill(mesh, engine, part)
        await ends(mesh, stream)
    await comes_back(mesh, life)


async def drain(mesh: VllmMesh, part: Part) -> None:
    """It is told to leave, and cannot hand on what it serves: one that dies at it comes back, as any does."""
    async with decoding(mesh) as (engine, stream):
        told = len(mesh.events(f"engine-{engine}", "engine.draining"))
        os.kill(mesh.parts(engine)["front"], signal.SIGTERM)
        await until(lambda: len(mesh.events(f"engine-{engine}", "engine.draining")) > told, "it drains", 60.0)
        assert not stream.done.is_set()
        life = await kill(mesh, engine, part)
        await ends(mesh, stream)
    await comes_back(mesh, life)


PHASE = {
    "start": start,
    "idle": idle,
    "sender": sender,
    "receiver": receiver,
    "decode": decode,
    "drain": drain,
}


def test_down_ends_an_engine_that_hangs_and_one_that_starts(mesh: VllmMesh) -> None:
    """The last one: it ends the mesh, of which nothing is left."""

    async def end() -> None:
        life = await kill(mesh, "e1", "front")
        await until(lambda: "core" in mesh.parts("e1"), "another life of it starts vLLM")
        assert mesh.child("e1").restarts > life.restarts
        mesh.look()
        freeze(mesh.parts("e0")["worker"])

    asyncio.run(end())
    assert mesh.down().stdout == "stopped\n"
    ended = mesh.events("supervisor-up", "child.exited")
    last = {each["child"]: (each["code"], each["error"]) for each in ended}
    assert last == dict.fromkeys(("gateway", "router", "engine-e0", "engine-e1", "index"), (0, ""))
    asyncio.run(until(lambda: not mesh.left(), "nothing is left", 60.0))
