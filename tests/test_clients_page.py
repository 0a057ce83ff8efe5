"""docs/clients.md says what each client tries, locks say what is installed, environments stay whole."""

from __future__ import annotations

import json
import re
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.clients.environment import Client, clients
from tests.support.clients.table import PAGE, packages, row, tried, with_table

CLIENTS = clients()
EXACT = re.compile(r"[\w.-]+==[^=<>~!*\s]+")


def test_the_table_is_that_of_the_scripts() -> None:
    """``python tests/support/clients/table.py --write`` makes it so."""
    page = PAGE.read_text()
    assert len(CLIENTS) > 10 and all(row(client) in page for client in CLIENTS)
    assert with_table(page) == page


@pytest.mark.parametrize("client", CLIENTS, ids=lambda client: client.name)
def test_a_client_is_locked(client: Client) -> None:
    lines = (client.folder / "requirements.txt").read_text().splitlines()
    assert lines and all(EXACT.fullmatch(line.partition(" ;")[0]) for line in lines)
    assert len(tried(client)) == client.script.read_text().count('check("') > 0
    locked = {line.partition(" ;")[0].lower() for line in lines}
    for name, version in packages(client).items():
        if client.is_node:
            tree = json.loads((client.folder / "package-lock.json").read_text())["packages"]
            assert tree[f"node_modules/{name}"]["version"] == version
            assert all("resolved" not in package for package in tree.values())
        else:
            assert f"{name}=={version}".lower() in locked


def test_torch_is_lent_again_when_the_checkout_that_lent_it_has_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    client = Client("guidellm")
    packages = client.home / "lib/python3.11/site-packages"
    packages.mkdir(parents=True)
    (client.home / "bin").mkdir()
    (client.home / "bin/python").symlink_to("/usr/bin/env")
    (client.home / "made-of").write_text(client.digest())
    lent = ("torch", "torchgen", "torch-1.0.dist-info")
    for name in lent:
        (packages / name).symlink_to(tmp_path / "gone" / name)
    for _ in range(2):
        with client.environment():
            torch = find_spec("torch")
            assert torch is not None and torch.origin is not None
            assert (packages / "torch").resolve() == Path(torch.origin).parent.resolve()
            assert [path.name for path in packages.glob("torch-*.dist-info")] == [
                f"torch-{metadata.version('torch')}.dist-info"
            ]


def test_an_environment_whose_python_has_gone_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    client = Client("litellm")
    (client.home / "bin").mkdir(parents=True)
    (client.home / "bin/python").symlink_to(tmp_path / "gone")
    (client.home / "made-of").write_text(client.digest())
    monkeypatch.setattr(Client, "_make", lambda it: it.home.joinpath("anew").touch())
    with client.environment():
        assert (client.home / "anew").exists()
