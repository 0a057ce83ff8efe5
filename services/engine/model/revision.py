"""What a model's name stands for in this process: a digest of what was loaded.

    revision = sha256(settings of the config; of each tensor its name, dtype, shape and bytes)[:32 digits]

Two engines may share KV only if theirs are equal (kvcache/layout.py, kvcache/prefix/hash.py): whatever
changes a layer's K or V is in it: weights as they stand in memory, the architecture, RoPE, windows,
quantisation, adapters that were merged. Labels and what only chooses tokens are not. What a model computes
from its config (RoPE's frequencies) counts by the config: another processor's last bit is another matter.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

REVISION_CHARS = 32
MAX_THREADS = 8

_LABELS = frozenset(
    {
        *("architectures", "transformers_version", "dtype", "torch_dtype"),
        *("id2label", "label2id", "problem_type", "return_dict", "output_attentions", "output_hidden_states"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "use_cache"),
        # Of training, and of a form of computing that gives the same.
        *("initializer_range", "attention_dropout", "pretraining_tp", "chunk_size_feed_forward"),
    }
)
"""Settings that change no KV; every other one counts, one that nobody here knows too."""


def revision_of(config: Any, module: nn.Module) -> str:
    """``config``: transformers', that ``module`` was made from. A GiB takes a core about half a second."""
    settings = {
        name: value
        for name, value in config.to_dict().items()
        if name not in _LABELS and not name.startswith("_")
    }
    digest = hashlib.sha256(b"microserve revision 1")
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    # Those that are saved with a model; a tied one is here once, by its first name.
    tensors = [*module.named_parameters(), *_saved_buffers(module)]
    with ThreadPoolExecutor(min(MAX_THREADS, os.cpu_count() or 1), "digest") as pool:
        digests = pool.map(_digest, [tensor for _, tensor in tensors])
        for (name, tensor), inner in zip(tensors, digests, strict=True):
            digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)} {inner}".encode())
    return digest.hexdigest()[:REVISION_CHARS]


def _saved_buffers(module: nn.Module) -> list[tuple[str, Tensor]]:
    saved = module.state_dict().keys()
    return [(name, buffer) for name, buffer in module.named_buffers() if name in saved]


def _digest(tensor: Tensor) -> str:
    if tensor.is_meta:  # shapes without bytes, in tests
        return "meta"
    flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


def own_memory(module: nn.Module) -> None:
    """Move every weight into memory of this process. One that was loaded as it is in its file is a view of
    it: a file that is written over would change the model under its revision, one that is cut short would
    end the process."""
    files = _mapped_files()
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if any(begin <= tensor.data_ptr() < end for begin, end in files):
                tensor.data = tensor.data.clone()


def _mapped_files() -> list[tuple[int, int]]:
    """Addresses of this process where files are."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    found = (address.split("-") for address, _, _, _, inode, *_ in lines if inode != "0")
    return [(int(begin, 16), int(end, 16)) for begin, end in found]
