"""One engine process: loads the model (loading.py), makes its heap (kvcache/heap/factory.py; of a world:
world.py), runner and core, and runs them in the shell (shell/)."""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from microserve.kvcache.codec import library
from microserve.kvcache.heap.factory import HeapData, choose_put, make_heap
from microserve.kvcache.heap.gpu import nvshmem
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.bus.transport import Bus
from microserve.protocol.errors import ConfigError
from microserve.protocol.metrics.port import MetricsPort
from microserve.protocol.process.lifecycle import Lifecycle
from microserve.protocol.settings.settings import Settings
from microserve.protocol.types import MAX_PROMPT_TOKENS
from microserve.services.engine.core.checks import Limits
from microserve.services.engine.core.coding.choice import CodecOptions
from microserve.services.engine.core.core import EngineCore
from microserve.services.engine.guidance.guide import Guides
from microserve.services.engine.guidance.pool import GuidePool, compiler_of
from microserve.services.engine.loading import Loading, make_runner
from microserve.services.engine.native.packed_model import PackedModel
from microserve.services.engine.native.runner import NativeRunner
from microserve.services.engine.pool_size import choose_num_blocks, layout_of
from microserve.services.engine.room import require_margin, turn
from microserve.services.engine.shell.index_client import require_reach
from microserve.services.engine.shell.shell import EngineShell
from microserve.services.engine.step_thread import StepThread
from microserve.services.engine.world import World, join_world

if TYPE_CHECKING:
    from microserve.services.engine.model.attention.step import MakeAttention
    from microserve.services.engine.model.model import LoadedModel


async def run_engine(settings: Settings, bus: Bus, lifecycle: Lifecycle) -> None:
    """Serve until cancelled. Raises :class:`ConfigError` when model or settings cannot work."""
    if not settings.model.path:
        raise ConfigError("model.path is not set", field="model.path")
    settings.check()
    require_reach(settings)
    loop = asyncio.get_running_loop()
    engine_id = settings.engine.id or f"engine-{secrets.token_hex(4)}"
    incarnation = secrets.randbits(62) | 1
    world: World | None = None
    async with AsyncExitStack() as taking:
        model, attention = await _load_in_turn(settings, taking)
        layout = make_layout(settings, model)
        if settings.heap == nvshmem.KIND:
            import torch

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
        engine = EngineShell(settings, bus, lifecycle, core, partial(StepThread, core))
        undo.pop_all()
    try:
        with MetricsPort(settings.metrics.host, settings.engine.metrics_port, engine.readings):
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
) -> tuple[PackedModel | LoadedModel, MakeAttention | None]:
    """Once it is known that model and pool fit; until ``taking`` ends no other engine here takes memory."""
    loop = asyncio.get_running_loop()
    # The ranks of a world wait for each other, and take what nvshmem.memory_mb says.
    takes_turns = settings.heap != nvshmem.KIND
    is_tight, attention = False, None
    with ThreadPoolExecutor(1, "load") as pool:
        loading = await loop.run_in_executor(pool, Loading, settings)
        model: PackedModel | LoadedModel | None = await loop.run_in_executor(pool, loading.find)
        if model is None:
            async with loading.alone():
                model = await loop.run_in_executor(pool, loading.find)  # another engine has made it, perhaps
                if model is None:
                    is_tight = await loop.run_in_executor(pool, loading.check_room)
                    if is_tight and takes_turns:
                        await taking.enter_async_context(turn())
                        await loop.run_in_executor(pool, loading.check_room)
                    model, attention = await loop.run_in_executor(pool, loading.load)
        if takes_turns and not is_tight:
            await taking.enter_async_context(turn())
    assert model is not None
    return model, attention


def make_layout(settings: Settings, model: PackedModel | LoadedModel) -> KvLayout:
    """How the KV of a loaded model lies in the heap. Raises :class:`ConfigError` for a pool without room."""
    return layout_of(settings, model.spec, choose_num_blocks(settings, model.spec))


def make_core(
    settings: Settings,
    model: PackedModel | LoadedModel,
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
    # A state to go on from and one that is written beside a sequence's KV, of a hybrid model.
    num_kv_blocks = num_blocks - 2 * heap.layout.num_state_blocks
    if num_kv_blocks < 1:
        raise ConfigError(
            f"kvcache.num_blocks: {num_blocks} blocks do not hold a request's state, which takes "
            f"{heap.layout.num_state_blocks} twice, and KV",
            field="kvcache.num_blocks",
        )
    runner = make_runner(settings, model, data, num_blocks, attention)
    if not isinstance(runner, NativeRunner) and settings.engine.device != "cpu":
        runner.warm_up()
        if settings.engine.cuda_graphs and spec.state is None:
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
            num_blocks=num_kv_blocks,
            max_waiting=settings.engine.max_waiting,
            eos_token_ids=frozenset(spec.eos_token_ids),
        ),
        max_num_seqs=settings.engine.max_num_seqs,
        max_num_batched_tokens=settings.engine.max_num_batched_tokens,
        lease_s=cache.lease_s,
        checksums=cache.checksums,
        compute_stream=runner.stream,
        kernels=runner.kernels,
        guides=_guides(settings, spec.vocab_size, frozenset(spec.eos_token_ids)),
        codecs=_codecs(settings),
    )


def _codecs(settings: Settings) -> CodecOptions | None:
    """Raises :class:`ConfigError` for a library that cannot be read."""
    engine = settings.engine
    known = library.load(engine.codec_library) if engine.codec_library else library.BUILT_IN
    if not engine.codec_threads:
        return None
    return CodecOptions(known, engine.codec_threads, engine.codec_min_quality)


def _guides(settings: Settings, vocab_size: int, ends: frozenset[int]) -> Guides:
    directory = Path(settings.model.path)
    return GuidePool(
        lambda: compiler_of(directory, vocab_size, ends),
        vocab_size,
        max_s=settings.engine.grammar_timeout_s,
    )
