"""From what ``model.path`` says to a directory: as it is, out of the cache, or from the Hub.

A revision that is whole in the cache is taken as it is, and nobody is asked: a start needs no network, and a
mesh that starts anew has the model that it had. ``microserve model fetch`` asks for what is new.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from msgspec.structs import replace

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.engine import NATIVE
from microserve.protocol.settings.settings import Settings
from microserve.services.engine.model.directory.families import refusal_of
from microserve.services.local.hub.fetch import Report, Wish, fetch
from microserve.services.local.hub.files import CONFIG
from microserve.services.local.hub.name import NotReached, local_model, parse_name
from microserve.services.local.hub.place import Place, usable, whole


def resolve(
    settings: Settings, environment: Mapping[str, str], report: Report, *, weights: bool = True
) -> Settings:
    """The same settings with a directory as ``model.path``, and a name; a path that is empty stays so.

    weights: False for who needs the tokenizer alone. Raises :class:`HubError` for a name that cannot be had,
    :class:`ConfigError` for what is here and is no model.
    """
    path = settings.model.path
    if not path:
        return settings
    any_family = settings.engine.backend != NATIVE  # what vLLM serves is vLLM's to say
    if (directory := local_model(path)) is not None:
        if not any_family:
            _require_family(directory)
        return settings
    name, place = parse_name(path), Place.of(environment)
    weights = weights and settings.model.load_format != "random"
    found = whole(place, name, weights=weights)
    if found is None:
        fits = settings if weights and not any_family else None
        wish = Wish(weights=weights, settings=fits, any_family=any_family)
        try:
            found = fetch(place, name, wish, report)
        except NotReached:
            found = usable(place, name, weights=weights)
            if found is None:
                raise
            report(f"{name} is taken as it is in {place.cache}: the Hub could not be asked", None)
    model = replace(settings.model, path=str(found), name=settings.model.name or name.repo)
    return replace(settings, model=model)


def _require_family(directory: Path) -> None:
    """Before a whole mesh is started for it; of a config.json that cannot be read an engine says more."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    if isinstance(config, dict) and (why := refusal_of(config)):
        raise ConfigError(f"model {directory} cannot be served: {why}", field="model.path")
