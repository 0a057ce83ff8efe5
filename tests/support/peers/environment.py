"""An environment for each program that reads our KV events or sends requests to our gateway: as clients have
theirs (tests/support/clients/environment.py).

    python -m tests.support.peers.environment [PEER ...]           makes them
    python -m tests.support.peers.environment --lock [PEER ...]    resolves requirements.in anew

A peer is a folder of tests/peers with a ``requirements.txt``; without ``requirements.in`` that one is written
by hand, because what the whole package requires is not needed for the part that is tried.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from tests.support.clients.environment import ROOT, Client, cache

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="PEER", help="all, if none is named")
    parser.add_argument("--lock", action="store_true")
    arguments = parser.parse_args()
    for peer in peers():
        if arguments.names and peer.name not in arguments.names:
            continue
        print(peer.name, flush=True)
        if not arguments.lock:
            with peer.environment():
                pass
        elif (peer.folder / "requirements.in").exists():
            peer.lock()


if __name__ == "__main__":
    main()
