"""The table of docs/clients.md: each client, its version, what its script tries.

python tests/support/clients/table.py --write     after a script or a version has changed
"""

from __future__ import annotations

import json
import re
import sys

from tests.support.clients.environment import ROOT, Client, clients

PAGE = ROOT / "docs/clients.md"
CHECK = re.compile(r'^@?check\(\s*"((?:[^"\\]|\\.)+)"', re.M)
PINNED = re.compile(r"^([\w.-]+)(?:\[[\w,]+\])?==(\S+)$", re.M)
HEAD = "| `CLIENT=` | packages | what is tried |\n|---|---|---|\n"
ROWS = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")


def tried(client: Client) -> list[str]:
    return CHECK.findall(client.script.read_text())


def packages(client: Client) -> dict[str, str]:
    """What a user would install, with versions."""
    if client.is_node:
        found: dict[str, str] = json.loads((client.folder / "package.json").read_text())["dependencies"]
        return found
    return dict(PINNED.findall((client.folder / "requirements.in").read_text()))


def row(client: Client) -> str:
    named = ", ".join(f"{name} {version}" for name, version in packages(client).items())
    return f"| `{client.name}` | {named} | {'; '.join(tried(client))} |\n"


def with_table(page: str) -> str:
    return ROWS.sub(lambda _: HEAD + "".join(map(row, clients())), page)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    PAGE.write_text(with_table(PAGE.read_text()))
