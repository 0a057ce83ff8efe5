"""How much room a model takes, and whether it is there, before a byte of its weights is here. Pure: is told
what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec.structs import replace

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.model.directory.families import HYBRID, NATIVE
from microserve.services.engine.model.spec import ModelSpec
from microserve.services.engine.pool_size import pool_of
from microserve.services.engine.room import Room, num_blocks_in
from microserve.services.local.hub.name import HubError

_ITEM_NBYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
DISK_MARGIN_NBYTES = 64 << 20
"""What stays free of a disk: logs and state are on it as well, as a rule."""


@dataclass(frozen=True, slots=True)
class Sizes:
    weights_nbytes: int
    """In memory, in ``model.dtype``."""
    spec: ModelSpec | None
    """As config.json has it; None where it leaves something to defaults that only transformers knows."""

    @property
    def kv_token_nbytes(self) -> int:
        """Of one token in all layers; 0: cannot be said."""
        spec = self.spec
        if spec is None:
            return 0
        return 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * _ITEM_NBYTES[spec.dtype]


def sizes_of(name: str, config: Mapping[str, Any], file_nbytes: int, dtype: str) -> Sizes:
    """``file_nbytes``: of the weights' files, which hold them in the dtype that ``config`` names."""
    stored = config.get("dtype") or config.get("torch_dtype")
    item_nbytes = _ITEM_NBYTES.get(stored) if isinstance(stored, str) else None
    weights_nbytes = file_nbytes * _ITEM_NBYTES[dtype] // item_nbytes if item_nbytes else file_nbytes
    return Sizes(weights_nbytes, _spec_of(name, config, dtype))


def check_memory(
    name: str, config: Mapping[str, Any], file_nbytes: int, settings: Settings, room: Room
) -> None:
    """Raises :class:`HubError` with the figures, and with what would fit. Of a GPU nothing is known here."""
    if settings.engine.device != "cpu":
        return
    fault = _fault(name, config, file_nbytes, settings, room)
    if fault is None:
        return
    fits = [
        words
        for words, changed in _smaller(settings)
        if _fault(name, config, file_nbytes, changed, room) is None
    ]
    told = f"; it would fit with {' or '.join(fits)}" if fits else ""
    raise HubError(f"{name} does not fit here: {fault}{told}")


def check_disk(name: str, missing_nbytes: int, free_nbytes: int, cache: str) -> None:
    """Raises :class:`HubError`."""
    if missing_nbytes and missing_nbytes + DISK_MARGIN_NBYTES > free_nbytes:
        raise HubError(
            f"{name} needs {in_bytes(missing_nbytes)} more in {cache}, of whose disk {in_bytes(free_nbytes)} "
            f"are free and {in_bytes(DISK_MARGIN_NBYTES)} stay so; HF_HOME=DIRECTORY takes another place"
        )


def in_bytes(nbytes: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= size:
            return f"{nbytes / size:.2f} {unit}"
    return f"{nbytes} bytes"


def _fault(
    name: str, config: Mapping[str, Any], file_nbytes: int, settings: Settings, room: Room
) -> str | None:
    sizes = sizes_of(name, config, file_nbytes, settings.model.dtype)
    num_copies = 1 if _is_shared(config, sizes, settings) else settings.mesh.engines
    weights_nbytes = sizes.weights_nbytes * num_copies
    if sizes.spec is None:
        if weights_nbytes < room.nbytes - room.margin_nbytes:
            return None
        return f"its weights take {in_bytes(weights_nbytes)}, {room.of} has {in_bytes(room.nbytes)} left"
    try:
        num_blocks_in(room, pool_of(settings, sizes.spec), weights_nbytes=weights_nbytes)
    except ConfigError as error:
        return error.detail.removeprefix("model.path: ").removeprefix("kvcache.num_blocks: ")
    return None


def _is_shared(config: Mapping[str, Any], sizes: Sizes, settings: Settings) -> bool:
    """Engines of this machine map one file of packed weights."""
    return (
        config.get("model_type") in NATIVE
        and settings.engine.cpu_kernels != "transformers"
        and settings.model.dtype != "float16"
        and sizes.weights_nbytes <= settings.model.packed_cache_mb << 20
    )


def _smaller(settings: Settings) -> list[tuple[str, Settings]]:
    """What could be asked for instead, in words and as settings."""
    found = []
    fewer = replace(settings, mesh=replace(settings.mesh, engines=1))
    half = replace(settings, model=replace(settings.model, dtype="bfloat16"))
    smaller_pool = replace(settings, kvcache=replace(settings.kvcache, num_blocks=0))
    if settings.model.dtype == "float32":
        found.append(("model.dtype bfloat16", half))
    if settings.mesh.engines > 1:
        found.append(("one engine", fewer))
    if settings.kvcache.num_blocks:
        found.append(("kvcache.num_blocks 0, which takes what there is", smaller_pool))
    return found


def _spec_of(name: str, config: Mapping[str, Any], dtype: str) -> ModelSpec | None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    if not isinstance(heads, int) or not isinstance(hidden, int) or heads < 1:
        return None
    if config.get("model_type") in HYBRID:
        return None  # how many of its layers keep KV may be such a default
    wanted: dict[str, Any] = {
        "num_layers": config.get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": config.get("num_key_value_heads") or heads,
        "head_dim": config.get("head_dim") or hidden // heads,
        "vocab_size": config.get("vocab_size"),
        "max_model_len": config.get("max_position_embeddings"),
    }
    if not all(type(value) is int and value > 0 for value in wanted.values()):
        return None
    return ModelSpec(
        name=name, eos_token_ids=frozenset(), dtype=dtype, sliding_windows=frozenset({None}), **wanted
    )
