"""A start takes what is here and asks nobody; what is not here is fetched, or said to be missing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.services.local.hub.name import HubError, NotReached
from microserve.services.local.hub.resolve import resolve
from tests.support.hub.server import Hub, serving
from tests.support.hub.small_model import FILES, WEIGHTS


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    hub.add("org/tiny", dict(FILES))
    with serving(hub):
        yield hub


@pytest.fixture
def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "HF_ENDPOINT": hub.endpoint}


def settings(path: str, **model: str) -> Settings:
    default = Settings()
    return replace(default, model=replace(default.model, path=path, **model))


def quiet(what: str, part: float | None) -> None:
    pass


def test_a_name_becomes_a_directory_and_the_name_that_is_served(
    hub: Hub, environment: dict[str, str]
) -> None:
    found = resolve(settings("org/tiny"), environment, quiet).model
    assert (Path(found.path) / WEIGHTS).read_bytes() == FILES[WEIGHTS]
    assert found.name == "org/tiny"
    assert resolve(settings("org/tiny@main"), environment, quiet).model.name == "org/tiny"
    assert resolve(settings("org/tiny", name="mine"), environment, quiet).model.name == "mine"


def test_what_is_here_is_taken_without_asking(hub: Hub, environment: dict[str, str]) -> None:
    first = resolve(settings("org/tiny"), environment, quiet)
    hub.repos["org/tiny"].commit({**FILES, WEIGHTS: b"newer"})
    hub.asked.clear()
    assert resolve(settings("org/tiny"), environment, quiet) == first
    assert resolve(settings("org/tiny"), {**environment, "HF_HUB_OFFLINE": "1"}, quiet) == first
    assert hub.asked == []


def test_all_services_of_a_mesh_have_one_directory(environment: dict[str, str]) -> None:
    gateways = resolve(settings("org/tiny"), environment, quiet, weights=False).model.path
    assert not (Path(gateways) / WEIGHTS).exists()
    assert resolve(settings("org/tiny"), environment, quiet).model.path == gateways
    assert resolve(settings("org/tiny"), environment, quiet, weights=False).model.path == gateways


def test_random_weights_are_not_fetched(environment: dict[str, str]) -> None:
    found = resolve(settings("org/tiny", load_format="random"), environment, quiet).model.path
    assert not (Path(found) / WEIGHTS).exists()


def test_what_others_have_fetched_is_completed_or_taken_as_it_is(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    """As transformers leaves a cache: all that it needed, and no record of ours."""
    directory = Path(resolve(settings("org/tiny"), environment, quiet).model.path)
    for record in (tmp_path / ".cache" / "microserve" / "hub").glob("*.json"):
        record.unlink()
    (directory / "tokenizer_config.json").unlink()
    told: list[str] = []
    hub.status = 503
    assert resolve(settings("org/tiny"), environment, lambda what, _: told.append(what)).model.path == str(
        directory
    )
    assert any("is taken as it is in" in what for what in told)
    hub.status = None
    resolve(settings("org/tiny"), environment, quiet)
    assert (directory / "tokenizer_config.json").is_file()


def test_what_is_nowhere_is_said(environment: dict[str, str]) -> None:
    offline = {**environment, "HF_HUB_OFFLINE": "1"}
    with pytest.raises(NotReached, match=r"org/tiny is not in .*HF_HUB_OFFLINE"):
        resolve(settings("org/tiny"), offline, quiet)
    with pytest.raises(HubError, match="has no model org/absent"):
        resolve(settings("org/absent"), environment, quiet)
    with pytest.raises(ConfigError, match="no model's name at the Hub"):
        resolve(settings("../org/tiny"), environment, quiet)


def test_a_directory_is_itself_and_nobody_is_asked(
    hub: Hub, environment: dict[str, str], tmp_path: Path
) -> None:
    for path in ("", str(tmp_path)):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        assert resolve(settings(path), environment, quiet) == settings(path)
    assert hub.asked == []


def test_a_directory_of_a_family_that_is_not_served_is_refused_before_a_mesh_is_started(
    environment: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt_oss"}')
    with pytest.raises(ConfigError, match="cannot be served: model_type 'gpt_oss' is not served: it has"):
        resolve(settings(str(tmp_path)), environment, quiet)
    for unreadable in ("{", "[]"):
        (tmp_path / "config.json").write_text(unreadable)
        assert resolve(settings(str(tmp_path)), environment, quiet) == settings(str(tmp_path))


def test_nothing_heavy_is_imported_for_what_is_here(environment: dict[str, str]) -> None:
    """A gateway without huggingface_hub serves what is in the cache."""
    resolve(settings("org/tiny"), environment, quiet)
    program = (
        "import sys; sys.modules['huggingface_hub'] = None\n"
        "from microserve.protocol.settings.sources import load_settings\n"
        "from microserve.services.local.hub.resolve import resolve\n"
        "from microserve.services.local.hub.name import HubError\n"
        "import os\n"
        "def found(name):\n"
        "    settings = load_settings(None, environment={}, overrides=[f'model.path={name!r}'])\n"
        "    return resolve(settings, os.environ, print)\n"
        "print(found('org/tiny').model.path)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub.file_download'} & set(sys.modules)\n"
        "try: found('org/other')\n"
        "except HubError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "snapshots" in done.stdout
    assert "to fetch org/other by its name huggingface_hub is needed" in done.stdout
