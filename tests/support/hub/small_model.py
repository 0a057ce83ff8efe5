"""A small model at a small Hub, and what is said when it cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from microserve.services.local.hub.fetch import Wish, fetch
from microserve.services.local.hub.name import HubError, parse_name
from microserve.services.local.hub.place import Place, whole
from tests.support.hub.server import digest_of

NAME = parse_name("org/tiny")
ALL = Wish()
WEIGHTS = "model.safetensors"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "torch_dtype": "float32",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}
FILES = {
    "config.json": json.dumps(CONFIG).encode(),
    "tokenizer.json": b'{"version": "1.0"}' + b" " * 5000,
    "tokenizer_config.json": b"{}",
    WEIGHTS: bytes(range(256)) * 400,
    "pytorch_model.bin": b"never",
    "README.md": b"# never",
}
NEEDED = {"config.json", "tokenizer.json", "tokenizer_config.json", WEIGHTS}


def blob(place: Place, path: str, content: bytes) -> Path:
    return place.repo(NAME) / "blobs" / digest_of(path, content)


def refusal(place: Place, wish: Wish = ALL, name: str = "org/tiny") -> str:
    """What is said; one sentence, and the revision stands for nothing."""
    with pytest.raises(HubError) as caught:
        fetch(place, parse_name(name), wish)
    assert "\n" not in str(caught.value)
    assert whole(place, parse_name(name)) is None
    assert not list(place.cache.rglob("refs/*"))
    return str(caught.value)
