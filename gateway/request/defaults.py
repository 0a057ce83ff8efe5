"""What a request that says nothing gets: OpenAI's defaults, or those that come with the model.

Owns ``generation_config.json`` as far as sampling goes, read once; as in vLLM, a field counts if it is there,
and ``do_sample`` does not (a request says by ``temperature`` whether it samples).
"""

from __future__ import annotations

import json
from pathlib import Path

import msgspec

from microserve.protocol.errors import ConfigError, located
from microserve.protocol.messages.request import sampling as bounds

FILE = "generation_config.json"


class SamplingDefaults(msgspec.Struct, frozen=True):
    """For fields that are null or missing in a request. The bounds are those of requests."""

    temperature: bounds.Temperature | None = None
    top_p: bounds.TopP | None = None
    top_k: bounds.TopK | None = None
    min_p: bounds.MinP | None = None
    repetition_penalty: bounds.RepetitionPenalty | None = None
    max_new_tokens: bounds.MaxTokens | None = None
    """Output of a conversation; without it, all that the context has room for."""

    @classmethod
    def of_model(cls, directory: str | Path) -> SamplingDefaults:
        """None of them without the file. Raises :class:`ConfigError` for what no request could say either."""
        file = Path(directory) / FILE
        if not file.is_file():
            return cls()
        try:
            return msgspec.convert(json.loads(file.read_text(encoding="utf-8")), cls)
        except msgspec.ValidationError as error:
            path, message = located(error)
            detail = f"{path}: {message}"
        except (OSError, ValueError) as error:
            detail = str(error)
        raise ConfigError(f"{file}: {detail} (gateway.generation_config=false: ignored)", field="model.path")
