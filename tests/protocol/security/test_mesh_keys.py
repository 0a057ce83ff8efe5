"""The keys of a mesh let everybody in where he has something to ask."""

from __future__ import annotations

from pathlib import Path

from microserve.protocol.bus.curve import create_mesh_keys
from microserve.protocol.security.rights import Entrance, Role, may_enter


def test_whoever_has_a_right_at_the_index_is_let_in_and_knows_its_key(tmp_path: Path) -> None:
    root = create_mesh_keys(tmp_path / "keys")
    callers = [
        role
        for role in (Role.ENGINE, Role.ROUTER, Role.GATEWAY, Role.OPERATOR)
        if may_enter(frozenset({role}), Entrance.INDEX)
    ]
    assert Role.GATEWAY in callers, "for its view"
    for role in callers:
        own = (root / role / "service.key").read_bytes()
        assert (root / "index" / "trusted" / role / f"{role}.key").read_bytes() == own
        assert (root / role / "index.key").read_bytes() == (root / "index" / "service.key").read_bytes()
