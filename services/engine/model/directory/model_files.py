"""The JSON files of a model's directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from microserve.protocol.errors import ConfigError


def read_json(path: Path) -> dict[str, Any]:
    """Raises :class:`ConfigError` (field ``model.path``) for what is not there, or no JSON object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}", field="model.path") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object", field="model.path")
    return content
