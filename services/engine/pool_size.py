"""How many KV blocks an engine has, and whether they and its model fit where they are to be.

Owns what the rule of room.py is asked with, for each kind of heap. Takes nothing.
"""

from __future__ import annotations

from microserve.kvcache.heap.gpu import nvshmem
from microserve.kvcache.heap.gpu.nvshmem_places import require_room
from microserve.kvcache.layout import KvLayout
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.protocol.types import MAX_PROMPT_TOKENS
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.room import (
    DEVICE_SHARE,
    HOST_SHARE,
    MAX_HOST_POOL_NBYTES,
    Pool,
    Room,
    num_blocks_in,
    unpromised_room,
)

TIGHT = 8
"""Engines that load at a time where so many of their models would fit; where not, they load in turn."""


def check_room(settings: Settings) -> bool:
    """Before anything is read: whether the machine is small for such models. Raises :class:`ConfigError` with
    what would fit."""
    from microserve.services.engine.model.model import load_model

    sketch = load_model(settings.model.path, dtype=settings.model.dtype, device="meta", load_format="random")
    if settings.heap == nvshmem.KIND:
        return False
    weights_nbytes = sum(each.numel() * each.element_size() for each in sketch.module.parameters())
    room = _room(settings)
    num_blocks_in(room, pool_of(settings, sketch.spec), weights_nbytes=weights_nbytes)
    return weights_nbytes * TIGHT > room.nbytes


def choose_num_blocks(settings: Settings, spec: ModelSpec) -> int:
    """``kvcache.num_blocks``, or what is good where that is 0; the model is loaded. Raises
    :class:`ConfigError` with what would fit."""
    if settings.heap == nvshmem.KIND:
        return settings.kvcache.num_blocks or _num_blocks_in_world(settings, spec)
    return num_blocks_in(_room(settings), pool_of(settings, spec))


def layout_of(settings: Settings, spec: ModelSpec, num_blocks: int) -> KvLayout:
    """Raises :class:`ConfigError` naming the setting that is out of bounds."""
    cache = settings.kvcache
    try:
        return KvLayout(
            model=settings.model.name or spec.name,
            num_layers=spec.num_layers,
            num_blocks=num_blocks,
            block_size=cache.block_size,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            dtype=spec.dtype,
            revision=spec.revision,
            rope=spec.rope,
            state_nbytes=spec.state_nbytes,
        )
    except ConfigError as error:
        if error.field not in ("num_blocks", "block_size"):
            raise
        path = f"kvcache.{error.field}"
        raise ConfigError(f"{path}: {error.detail}", field=path) from None


def _room(settings: Settings) -> Room:
    if settings.engine.device == "cpu":
        return unpromised_room()
    import torch

    try:
        free, total = torch.cuda.mem_get_info(torch.device(settings.engine.device))
    except (RuntimeError, AssertionError) as error:  # torch asserts where it was built without the device
        raise ConfigError(
            f"engine.device {settings.engine.device!r} cannot be used: {error}", field="engine.device"
        ) from None
    return Room(free, total, settings.engine.device)


def pool_of(settings: Settings, spec: ModelSpec) -> Pool:
    """What the settings want for such a model, whose weights may not be here. Raises :class:`ConfigError`."""
    layout, engine = layout_of(settings, spec, 1), settings.engine
    max_model_len = min(engine.max_model_len or spec.max_model_len, spec.max_model_len, MAX_PROMPT_TOKENS)
    on_host = engine.device == "cpu"
    # A hybrid model's state twice: one to go on from, one that is written.
    useful = engine.max_num_seqs * (layout.num_blocks_for(max_model_len) + 2 * layout.num_state_blocks)
    return Pool(
        settings.kvcache.num_blocks,
        layout.data_nbytes,
        # What no sequence holds is prefix cache, and a device has nothing better to do with its memory.
        useful if on_host else (KvLayout.MAX_TOKENS - 1) // layout.block_size,
        (HOST_SHARE if on_host else DEVICE_SHARE) / settings.mesh.engines,
        MAX_HOST_POOL_NBYTES if on_host else None,
    )


def _num_blocks_in_world(settings: Settings, spec: ModelSpec) -> int:
    """As many as ``nvshmem.memory_mb`` holds."""
    own, num_slots = settings.nvshmem, settings.kvcache.grant_slots
    capacity_nbytes = own.memory_mb << 20

    def fits(num_blocks: int) -> bool:
        try:
            require_room(layout_of(settings, spec, num_blocks), num_slots, own.num_ranks, capacity_nbytes)
        except ConfigError:
            return False
        return True

    low, high = 1, (KvLayout.MAX_TOKENS - 1) // settings.kvcache.block_size
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low  # of one that does not fit either, whoever takes it says so
