"""Which tokens end a sequence: what ``transformers.generate`` would stop at, and nothing else.

``generation_config.json`` decides where it is there, even by naming none; else ``config.json``. The tokenizer
has no say; where its end is not among them, an operator is told: chats then run on past their end. Owns the
opinions of these files; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.services.engine.model.directory.model_files import read_json

_logger = structlog.get_logger()


def eos_of(directory: Path, config: Mapping[str, Any], *, tells: bool = True) -> frozenset[int]:
    """``config``: what config.json holds; ``tells``: of a tokenizer that disagrees. Raises
    :class:`ConfigError` for ids that are none."""
    generation = directory / "generation_config.json"
    source = generation if generation.is_file() else directory / "config.json"
    settings = read_json(generation) if generation.is_file() else config
    declared = settings.get("eos_token_id")
    ids = declared if isinstance(declared, list) else [] if declared is None else [declared]
    if not all(type(each) is int and each >= 0 for each in ids):
        raise ConfigError(f"{source}: eos_token_id {declared!r} is no token id", field="model.path")
    token, token_id = _tokenizers_eos(directory) if tells else ("", None)
    if token_id is not None and token_id not in ids:
        _logger.warning(
            log.EOS_MISMATCHED,
            eos_token_ids=ids,
            source=source.name,
            tokenizer_eos_token=token,
            tokenizer_eos_token_id=token_id,
        )
    return frozenset(ids)


def _tokenizers_eos(directory: Path) -> tuple[str, int | None]:
    """The tokenizer's end and its id, None where its files do not tell: they are not needed here."""
    settings = _read_if_can(directory / "tokenizer_config.json")
    token = settings.get("eos_token")
    if isinstance(token, dict):
        token = token.get("content")
    if not isinstance(token, str):
        return "", None
    tokenizer = _decode_if_can(_read_bytes(directory / "tokenizer.json"), _Tokenizer)
    if tokenizer is None:
        return token, None
    for each in tokenizer.added_tokens or []:
        if each.content == token:
            return token, each.id
    model = _decode_if_can(tokenizer.model, _TokenizerModel) if tokenizer.model else None
    return token, model.vocab.get(token) if model is not None else None


class _Added(msgspec.Struct):
    content: str = ""
    id: int | None = None


class _Tokenizer(msgspec.Struct):
    """What is wanted of a file of megabytes."""

    added_tokens: list[_Added] | None = None
    model: msgspec.Raw = msgspec.Raw()


class _TokenizerModel(msgspec.Struct):
    vocab: dict[str, int]


T = TypeVar("T")


def _decode_if_can(content: bytes | msgspec.Raw, kind: type[T]) -> T | None:
    try:
        return msgspec.json.decode(content, type=kind)
    except msgspec.DecodeError:  # no JSON, or of another form
        return None


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _read_if_can(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError:
        return {}
