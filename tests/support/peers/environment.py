"""An environment for each program that reads our KV events or sends requests to our gateway: as clients have
theirs (tests/support/clients/environment.py).

    python -m tests.support.peers.environment [PEER ...]           makes them
    python -m tests.support.peers.environment --lock [PEER ...]    resolves requirements.in anew

A peer is a folder of tests/peers with a ``requirements.txt``; without ``requirements.in`` that one is written
by hand, because what the whole package requires is not needed for the part that is tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.support.clients.environment import ROOT, Client, cache, make_or_lock

PEERS = ROOT / "tests/peers"


@dataclass(frozen=True)
class Peer(Client):
    @property
    def folder(self) -> Path:
        return PEERS / self.name

    @property
    def home(self) -> Path:
        return cache().with_name("peers") / self.name

    @property
    def python(self) -> Path:
        return self.home / "bin/python"


def peers() -> list[Peer]:
    return [Peer(path.parent.name) for path in sorted(PEERS.glob("*/requirements.txt"))]


if __name__ == "__main__":
    make_or_lock(__doc__, peers())
