"""docs/clients.md says of every client what its script tries, and locks say what is installed."""

from __future__ import annotations

import json
import re

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
