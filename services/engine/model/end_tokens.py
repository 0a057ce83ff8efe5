"""Which tokens end a sequence: what ``transformers.generate`` would stop at, and nothing else.

``generation_config.json`` decides where it is there, even by naming none; else ``config.json``. The tokenizer
has no say; where its end is not among them, an operator is told: chats then run on past their end. Owns the
opinions of these files; knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import structlog

from microserve.protocol import log
from microserve.protocol.errors import ConfigError
from microserve.services.engine.model.model_files import read_json

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
    tokenizer = _read_if_can(directory / "tokenizer.json")
    for each in tokenizer.get("added_tokens") or []:
        if isinstance(each, dict) and each.get("content") == token:
            return token, each.get("id")
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    return token, vocabulary.get(token) if isinstance(vocabulary, dict) else None


def _read_if_can(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError:
        return {}
