"""Adapters (LoRA, in PEFT's files) that vLLM serves beside the model, all from the start on.

    model.adapters ─> read_adapters (files, pure) ─> arguments of vLLM ─> load_adapters ─> digests once more

What a name stands for is fixed for the engine's life: vLLM keeps all of them in memory (``max_cpu_loras``),
and files that change while it loads them are refused. Knows no requests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.adapter import Adapter

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.engine.async_llm import AsyncLLM

RANKS: Final = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""That vLLM makes room for."""
CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")
_LABELS = frozenset({"base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "peft_version"})
"""Of a config, what changes nothing that is computed."""


MAX_HEADER_NBYTES = 100_000_000
"""Of a file of safetensors: its own limit."""
Shape = tuple[str, tuple[int, ...]]
"""Of a tensor, with its dtype as the file calls it."""


class _Tensor(msgspec.Struct):
    """Of a header; metadata has neither."""

    dtype: str = ""
    shape: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class FoundAdapter:
    adapter: Adapter
    directory: Path
    rank: int
    """The highest of its modules."""


def read_adapters(named: Mapping[str, str], model: Path) -> list[FoundAdapter]:
    """``named``: directories by name; ``model``: that of the model. Raises :class:`ConfigError` that names
    the adapter, also for one of another model: vLLM would put what it has into a part of what it should have.
    """
    found = [_read(name, Path(path).expanduser().resolve()) for name, path in sorted(named.items())]
    shapes: dict[str, Shape] = {}
    for file in model.glob("*.safetensors") if found else ():
        shapes |= _shapes(file, "model.path")
    for each in found:
        _check_shapes(each, shapes)
    return found


def _check_shapes(found: FoundAdapter, of_model: Mapping[str, Shape]) -> None:
    """Of each matrix that the model has under that name, whole and in floats."""
    path = f"model.adapters.{found.adapter.name}"
    weights = found.directory / WEIGHTS[0]
    for name, (_, shape) in _shapes(weights, path).items() if weights.is_file() else ():
        module, side, _ = name.removeprefix("base_model.model.").rpartition(".lora_")
        dtype, matrix = of_model.get(f"{module}.weight", ("", ()))
        if not side or len(matrix) != 2 or len(shape) != 2 or not dtype.startswith(("F", "BF")):
            continue
        which, own, theirs = (
            ("in", shape[1], matrix[1]) if ".lora_A." in name else ("out", shape[0], matrix[0])
        )
        if own != theirs:
            raise ConfigError(
                f"{path} is of another model: {module} has {which}_features {own}, the model's has {theirs}",
                field=path,
            )


def _shapes(file: Path, path: str) -> dict[str, Shape]:
    """By name, of a file of safetensors. ``path``: of the setting that names it."""
    try:
        with file.open("rb") as source:
            nbytes = int.from_bytes(source.read(8), "little")
            if nbytes > MAX_HEADER_NBYTES:
                raise ConfigError(f"{path}: {file} is no file of safetensors", field=path)
            header = msgspec.json.decode(source.read(nbytes), type=dict[str, _Tensor])
    except OSError as error:
        raise ConfigError(f"{path}: {file}: {error.strerror}", field=path) from None
    except msgspec.MsgspecError:
        raise ConfigError(f"{path}: {file} is no file of safetensors", field=path) from None
    return {name: (tensor.dtype, tensor.shape) for name, tensor in header.items()}


def _read(name: str, directory: Path) -> FoundAdapter:
    path = f"model.adapters.{name}"
    try:
        config = msgspec.json.decode((directory / CONFIG).read_bytes())
        weights = next((directory / each for each in WEIGHTS if (directory / each).is_file()), None)
        if weights is None:
            raise ConfigError(f"{path}: {directory} has no {WEIGHTS[0]}", field=path)
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: {error.filename}: {error.strerror}", field=path) from None
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: {directory / CONFIG} is no JSON: {error}", field=path) from None
    kind = config.get("peft_type") if isinstance(config, dict) else None
    if kind != "LORA":
        raise ConfigError(f"{path}: peft_type in {CONFIG} must be 'LORA', is {kind!r}", field=path)
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if not all(type(rank) is int and 0 < rank <= RANKS[-1] for rank in ranks):
        raise ConfigError(f"{path}: r in {CONFIG} must be 1 to {RANKS[-1]}, is {ranks}", field=path)
    counts = {key: value for key, value in config.items() if key not in _LABELS}
    said = msgspec.json.encode(["microserve adapter 1", counts, digest], order="sorted")
    return FoundAdapter(Adapter(name, hashlib.sha256(said).hexdigest()[:32]), directory, max(ranks))


def arguments_for(found: list[FoundAdapter], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Of ``AsyncEngineArgs``; ``arguments``: those that ``vllm.arguments`` has. Empty without adapters."""
    if not found:
        return {}
    rank, most = max(each.rank for each in found), arguments.get("max_loras", len(found))
    return {
        "enable_lora": True,
        "max_loras": most,
        "max_cpu_loras": max(most, len(found)) if isinstance(most, int) else len(found),
        "max_lora_rank": next(room for room in RANKS if room >= rank),
    }


def lora_requests(found: list[FoundAdapter]) -> dict[str, LoRARequest]:
    """By name. Their numbers go out with KV events."""
    from vllm.lora.request import LoRARequest

    return {
        each.adapter.name: LoRARequest(each.adapter.name, number, str(each.directory))
        for number, each in enumerate(found, 1)
    }


async def load_adapters(engine: AsyncLLM, found: list[FoundAdapter], requests: Mapping[str, Any]) -> None:
    """Raises :class:`ConfigError` for one that vLLM refuses, or whose files are others by now."""
    for each in found:
        name = each.adapter.name
        path = f"model.adapters.{name}"
        try:
            is_loaded = await engine.add_lora(requests[name])
        except Exception as error:
            said = str(error).removesuffix(", please check the stack trace above for the root cause")
            raise ConfigError(f"{path}: vLLM does not load it: {said}", field=path) from error
        if not is_loaded:
            raise ConfigError(f"{path}: vLLM does not load it", field=path)
        if _read(name, each.directory).adapter != each.adapter:
            raise ConfigError(f"{path}: {each.directory} has changed while it was loaded", field=path)
