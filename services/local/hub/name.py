"""What ``--model`` may say: a directory, or ``ORG/NAME[@REVISION]`` at the Hub. Pure, but for looking at the
directory."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from microserve.protocol.errors import ConfigError

MAX_CHARS = 96
"""Of a part of a name, as at the Hub."""
MAX_REVISION_CHARS = 200
DEFAULT_REVISION = "main"

_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_REVISION_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]*[A-Za-z0-9_])?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubError(Exception):
    """A model cannot be had by its name; the text is one sentence that says why, and what to do."""


class NotReached(HubError):
    """There is no Hub to ask: no network, or it was not to be asked."""


@dataclass(frozen=True, slots=True)
class ModelName:
    """A repository at the Hub, at a branch, tag or commit."""

    repo: str
    """``ORG/NAME``."""
    revision: str = DEFAULT_REVISION

    def __str__(self) -> str:
        return self.repo if self.revision == DEFAULT_REVISION else f"{self.repo}@{self.revision}"

    @property
    def folder(self) -> str:
        """In the cache of huggingface_hub, as it is documented."""
        return "models--" + self.repo.replace("/", "--")

    @property
    def is_pinned(self) -> bool:
        """The revision is a commit: what it holds never changes."""
        return _COMMIT.fullmatch(self.revision) is not None


def parse_name(text: str) -> ModelName:
    """Raises :class:`ConfigError` (field ``model.path``) for what is no name: none leads out of the cache."""
    repo, at, revision = text.partition("@")
    parts = repo.split("/")
    well_formed = len(parts) == 2 and all(map(_is_part, parts))
    if not well_formed:
        raise _wrong(
            f"{text!r} is no directory with a config.json, and no model's name at the Hub (ORG/NAME)"
        )
    if not at:
        return ModelName(repo)
    parts = revision.split("/")
    if len(revision) > MAX_REVISION_CHARS or not all(_REVISION_PART.fullmatch(part) for part in parts):
        raise _wrong(f"{revision!r} is no revision: a branch, a tag or a commit goes behind the @")
    return ModelName(repo, revision)


def with_revision(model: str | None, revision: str | None) -> str | None:
    """``--model`` and ``--revision`` in one. Raises :class:`ConfigError` where they do not go together."""
    if revision is None:
        return model
    if model is None or "@" in model or Path(model).exists():
        raise _wrong("is no name: --revision goes with ORG/NAME")
    return f"{model}@{revision}"


def local_model(path: str) -> Path | None:
    """The directory that ``path`` is; None: nothing of that name is here. Raises :class:`ConfigError` (field
    ``model.path``) for what is here and is no model that is served."""
    place = Path(path)
    if place.is_dir():
        if why := _no_model(place):
            raise _refusal(path, why)
        return place
    if place.exists():
        raise _refusal(path, _no_file(place))
    return None


def _is_part(part: str) -> bool:
    return (
        len(part) <= MAX_CHARS
        and _PART.fullmatch(part) is not None
        and "--" not in part
        and ".." not in part
        and not part.endswith(".git")
    )


def _no_model(directory: Path) -> str:
    adapter = directory / "adapter_config.json"
    names = {file.name for file in directory.iterdir()}
    has_weights = any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names)
    if adapter.is_file() and not ("config.json" in names and has_weights):
        return f"it is an adapter{_base_of(adapter)}: adapters are not served, merge it into its model first"
    if "config.json" in names or "tokenizer.json" in names:  # the latter is all that a gateway needs
        return ""
    if any(name.endswith(".gguf") for name in names):
        return "it holds GGUF files, which are not served, and no config.json: safetensors are wanted"
    return "it holds no config.json"


def _no_file(file: Path) -> str:
    if file.suffix == ".gguf":
        return "it is a GGUF file, which is not served: config.json and safetensors are wanted"
    return "it is a file"


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        return ""
    return f" of {base}" if isinstance(base, str) and base else ""


def _refusal(path: str, why: str) -> ConfigError:
    return _wrong(f"{path!r} is not a model's directory: {why}")


def _wrong(text: str) -> ConfigError:
    return ConfigError(f"model.path {text}", field="model.path")
