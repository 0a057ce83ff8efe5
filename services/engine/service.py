"""One engine process: loads the model, makes its heap (kvcache/heap/factory.py; of a world: world.py), runner
and core, and runs them in the shell (shell.py)."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack

import torch

from microserve.kvcache.heap import nvshmem
from microserve.kvcache.heap.factory import HeapData, choose_put, make_heap
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings import Settings
from microserve.protocol.types import MAX_PROMPT_TOKENS
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.core.state import Limits
from microserve.services.engine.lean_import import without_compilers
from microserve.services.engine.model.attention import MakeAttention
from microserve.services.engine.model.attention_choice import choose_attention
from microserve.services.engine.model.model import LoadedModel, load_model
from microserve.services.engine.model.native import choose_step
from microserve.services.engine.model.runner import TRANSFORMERS, ModelRunner
from microserve.services.engine.pool_size import check_room, choose_num_blocks, layout_of
from microserve.services.engine.room import require_margin, turn
from microserve.services.engine.shell import EngineShell
from microserve.services.engine.world import World, join_world


async def run_engine(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
    """Serve until cancelled. Raises :class:`ConfigError` when model or settings cannot work."""
    if not settings.model.path:
        raise ConfigError("model.path is not set", field="model.path")
    settings.check()
    torch.set_num_threads(settings.engine.threads)
    loop = asyncio.get_running_loop()
    engine_id = settings.engine.id or f"engine-{secrets.token_hex(4)}"
    incarnation = secrets.randbits(62) | 1
    world: World | None = None
    async with AsyncExitStack() as taking:
        model, attention = await _load_in_turn(settings, taking)
        layout = make_layout(settings, model)
        if settings.heap == nvshmem.KIND:
            device = torch.device(settings.engine.device)
            world = await join_world(
                settings,
                bus,
                lifecycle,
                layout,
                incarnation,
                device=device.index or 0,
                block_put=choose_put(device),
            )
            heap: Heap = world.heap
            data: HeapData = torch.as_tensor(world.heap.data, device=device)
        else:
            heap, data = make_heap(settings, layout, incarnation, require_margin)
    with ExitStack() as undo:
        undo.callback(heap.close)  # until the engine owns it, in whatever way this ends
        with ThreadPoolExecutor(1, "load") as pool:
            core = await loop.run_in_executor(
                pool, make_core, settings, model, engine_id, heap, data, attention
            )
        engine = EngineShell(settings, bus, lifecycle, core)
        undo.pop_all()
    try:
        if world is None:
            await engine.run()
        else:
            async with asyncio.TaskGroup() as tasks:
                watching = tasks.create_task(world.watch(core.lock))
                await engine.run()
                watching.cancel()
    finally:
        engine.close()


async def _load_in_turn(
    settings: Settings, taking: AsyncExitStack
) -> tuple[LoadedModel, MakeAttention | None]:
    """Once it is known that model and pool fit; until ``taking`` ends no other engine here takes memory."""
    loop = asyncio.get_running_loop()
    # The ranks of a world wait for each other, and take what nvshmem.memory_mb says.
    takes_turns = settings.heap != nvshmem.KIND
    with without_compilers(), ThreadPoolExecutor(1, "load") as pool:
        is_tight = await loop.run_in_executor(pool, check_room, settings)
        if is_tight and takes_turns:
            await taking.enter_async_context(turn())
            await loop.run_in_executor(pool, check_room, settings)
        loaded = await loop.run_in_executor(pool, _load, settings)
        if takes_turns and not is_tight:
            await taking.enter_async_context(turn())
    return loaded


def _load(settings: Settings) -> tuple[LoadedModel, MakeAttention | None]:
    engine = settings.engine
    model = load_model(
        settings.model.path,
        dtype=settings.model.dtype,
        device=engine.device,
        load_format=settings.model.load_format,
    )
    device, block_size = torch.device(engine.device), settings.kvcache.block_size
    return model, choose_attention(engine.attention, model.spec, block_size, device)


def make_layout(settings: Settings, model: LoadedModel) -> KvLayout:
    """How the KV of a loaded model lies in the heap. Raises :class:`ConfigError` for a pool without room."""
    return layout_of(settings, model.spec, choose_num_blocks(settings, model.spec))


def make_core(
    settings: Settings,
    model: LoadedModel,
    engine_id: str,
    heap: Heap,
    data: HeapData,
    attention: MakeAttention | None = None,
) -> EngineCore:
    """Runner and core for a loaded model; ``data`` is the data region of ``heap``, as the runner uses it;
    ``attention``: None for what the device is best at. On a GPU it may take a minute to capture graphs."""
    spec, cache = model.spec, settings.kvcache
    max_model_len = min(
        settings.engine.max_model_len or spec.max_model_len, spec.max_model_len, MAX_PROMPT_TOKENS
    )
    num_blocks = heap.layout.num_blocks
    runner = ModelRunner(
        model,
        data,
        num_blocks,
        cache.block_size,
        make_attention=attention,
        make_step=choose_step(settings, model),
    )
    if runner.kernels != TRANSFORMERS:
        model.module.to("meta")  # what it had is packed
    if settings.engine.device != "cpu":
        runner.warm_up()
        if settings.engine.cuda_graphs:
            runner.capture_decodes(settings.engine.max_num_seqs, max_model_len)
    return EngineCore(
        engine_id=engine_id,
        incarnation=heap.address.incarnation,
        model=heap.layout.model,
        heap=heap,
        runner=runner,
        limits=Limits(
            max_model_len=max_model_len,
            vocab_size=spec.vocab_size,
            num_blocks=num_blocks,
            max_waiting=settings.engine.max_waiting,
            eos_token_ids=frozenset(spec.eos_token_ids),
        ),
        max_num_seqs=settings.engine.max_num_seqs,
        max_num_batched_tokens=settings.engine.max_num_batched_tokens,
        lease_s=cache.lease_s,
        checksums=cache.checksums,
        compute_stream=runner.stream,
        kernels=runner.kernels,
    )
