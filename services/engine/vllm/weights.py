"""What a model's name stands for where vLLM loads it: a digest of its files and of what vLLM is told of them.

Two engines exchange KV only if theirs are equal. Our own engines digest what stands in memory
(services/engine/model/revision.py); what vLLM makes of the files is its own, so the digests never meet.
"""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from microserve.protocol.errors import ConfigError

READERS = 4
_KINDS = ("config.json", "*.safetensors", "*.bin", "*.pt", "*.gguf", "*quant*.json")


def revision_of(directory: Path, *, load_format: str, arguments: dict[str, Any], version: str) -> str:
    """32 digits. ``arguments``: more of vLLM's engine arguments, whatever they change. Raises
    :class:`ConfigError` for files that cannot be read."""
    kinds = _KINDS if load_format != "random" else ("config.json",)
    files = sorted({path for kind in kinds for path in directory.glob(kind) if path.is_file()})
    try:
        with ThreadPoolExecutor(READERS, "digest") as readers:
            digests = list(readers.map(_digest, files))
    except OSError as error:
        raise ConfigError(f"the model's files cannot be read: {error}", field="model.path") from error
    named = [(path.name, digest) for path, digest in zip(files, digests, strict=True)]
    said = msgspec.json.encode([version, load_format, arguments, named], order="sorted")
    return hashlib.sha256(said).hexdigest()[:32]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
