"""Which files of a repository are needed to serve it. Pure.

Needed are config.json, what a tokenizer and a chat template are read from, and one set of safetensors: the
one that transformers would load. Not needed is the same in other forms (``*.bin``, ``*.gguf``, ``original/``,
``onnx/``, a second set of safetensors), and what is written about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from microserve.services.local.hub.name import HubError

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
WEIGHTS, WEIGHTS_INDEX = "model.safetensors", "model.safetensors.index.json"
_BESIDE = (
    *("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json"),
)
MAX_SMALL_NBYTES = 256 << 20
"""Of a file that is no weights: the largest tokenizers take a tenth of it."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    path: str
    nbytes: int
    digest: str = ""
    """SHA-256 of its content where it is stored as a large file, else its id in git; empty: not told."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository at one commit."""

    commit: str
    files: Mapping[str, RemoteFile]


@dataclass(frozen=True, slots=True)
class Needed:
    small: tuple[RemoteFile, ...]
    """All but the weights: what a gateway needs."""
    weights: tuple[RemoteFile, ...]

    @property
    def weights_nbytes(self) -> int:
        return sum(each.nbytes for each in self.weights)

    @property
    def files(self) -> tuple[RemoteFile, ...]:
        """The weights come last: where they are whole, all is."""
        return (*self.small, *self.weights)


def needed_of(repo: str, listing: Listing, index: Mapping[str, Any] | None) -> Needed:
    """``index``: what the index of the weights holds, where :func:`wants_index` asks for it. Raises
    :class:`HubError` for a repository that is no model to serve."""
    files = listing.files
    weights = _weights_of(repo, files, index)
    if TOKENIZER not in files:
        raise HubError(f"{repo} has no tokenizer.json, and its text cannot be read without")
    names = [CONFIG, *(name for name in _BESIDE if name in files), TOKENIZER]
    if wants_index(files):
        names.append(WEIGHTS_INDEX)
    for name in names:
        if files[name].nbytes > MAX_SMALL_NBYTES:
            raise HubError(f"{name} of {repo} has {files[name].nbytes >> 20} MiB, which none of its kind has")
    return Needed(tuple(files[name] for name in names), tuple(files[name] for name in weights))


def wants_index(files: Mapping[str, RemoteFile]) -> bool:
    """The weights are in several files."""
    return WEIGHTS not in files and WEIGHTS_INDEX in files


def require_config(repo: str, files: Mapping[str, RemoteFile]) -> None:
    """Raises :class:`HubError` for a repository that is something else."""
    if CONFIG in files:
        return
    if "adapter_config.json" in files:
        raise HubError(f"{repo} is an adapter: adapters are not served, merge it into its model first")
    if any(name.endswith(".gguf") for name in files):
        raise HubError(f"{repo} holds GGUF files, which are not served: take the model they were made of")
    raise HubError(f"{repo} holds no config.json: it is no model that is served")


def shards_of(index: Mapping[str, Any]) -> list[str]:
    """Names of the files that an index of weights speaks of, each once; empty where it is no such index."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, Mapping):
        return []
    return sorted({name for name in weight_map.values() if isinstance(name, str)})


def _weights_of(repo: str, files: Mapping[str, RemoteFile], index: Mapping[str, Any] | None) -> list[str]:
    if WEIGHTS in files:
        return [WEIGHTS]
    if index is not None:
        names = shards_of(index)
        if not names:
            raise HubError(f"{WEIGHTS_INDEX} of {repo} names no files")
        if absent := [name for name in names if name not in files]:
            raise HubError(f"{repo} lacks {absent[0]}, which {WEIGHTS_INDEX} names")
        if odd := [name for name in names if "/" in name or not name.endswith(".safetensors")]:
            raise HubError(f"{WEIGHTS_INDEX} of {repo} names {odd[0]!r}, which is no file of weights")
        return names
    if any(name.endswith((".bin", ".pt", ".pth")) for name in files):
        raise HubError(f"{repo} has its weights as pickles alone, which may run code: safetensors are wanted")
    raise HubError(f"{repo} holds no {WEIGHTS}")
