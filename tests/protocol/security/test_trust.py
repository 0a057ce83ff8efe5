"""Whose key has which role, by the files of a directory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import CurveKeys, create_keys, create_mesh_keys, keys_of_role
from microserve.protocol.errors import ConfigError
from microserve.protocol.security.rights import NOBODY, Role
from microserve.protocol.security.trust import Trust


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory that trusts nobody; keys of others are beside it."""
    for name in ("own", "a", "b"):
        create_keys(tmp_path / name)
    (tmp_path / "own" / "trusted" / "service.key").unlink()
    return tmp_path / "own"


def key_of(own: Path, name: str) -> str:
    return CurveKeys.load(own.parent / name).public.decode()


def put(own: Path, name: str, place: str) -> Path:
    (own / place).mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(own.parent / name / "service.key", own / place / f"{name}.key"))


@pytest.mark.parametrize(
    ("place", "role"),
    [
        ("trusted", Role.SERVICE),
        ("trusted/engine", Role.ENGINE),
        ("trusted/gateway", Role.GATEWAY),
        ("trusted/operator", Role.OPERATOR),
        ("operators", Role.OPERATOR),
    ],
)
def test_a_role_is_a_place_and_ends_with_the_file(own: Path, place: str, role: Role) -> None:
    trust, key = Trust(own), key_of(own, "a")
    assert trust.roles(key) == NOBODY
    file = put(own, "a", place)
    assert trust.refresh() == set() and trust.roles(key) == {role}
    assert trust.refresh() == set()
    file.unlink()
    assert trust.refresh() == {key} and trust.roles(key) == NOBODY


def test_a_key_in_two_places_has_both_roles_and_loses_them_one_by_one(own: Path) -> None:
    operator, _ = put(own, "a", "operators"), put(own, "a", "trusted")
    trust, key = Trust(own), key_of(own, "a")
    assert trust.roles(key) == {Role.OPERATOR, Role.SERVICE}
    operator.unlink()
    assert trust.refresh() == {key} and trust.roles(key) == {Role.SERVICE}


def test_a_key_that_is_replaced_in_place_is_noticed(own: Path) -> None:
    file = put(own, "a", "trusted/router")
    trust = Trust(own)
    file.write_text((own.parent / "b" / "service.key").read_text())
    os.utime(file, (1, 1))
    assert trust.refresh() == {key_of(own, "a")}
    assert trust.roles(key_of(own, "b")) == {Role.ROUTER}


@pytest.mark.parametrize("content", [b"", b"junk", b"public-key", b"public-key = ''", b"public-key = '\xff'"])
def test_a_damaged_file_gives_nobody_a_right_and_harms_no_other(own: Path, content: bytes) -> None:
    put(own, "a", "trusted")
    (own / "trusted" / "c.key").write_bytes(content)
    trust = Trust(own)
    assert trust.roles(key_of(own, "a")) == {Role.SERVICE}
    assert trust.roles("") == NOBODY


def test_a_directory_of_no_role_is_a_wrong_setting(own: Path) -> None:
    (own / "trusted" / ".kept-by-a-tool").mkdir()
    Trust(own)
    (own / "trusted" / "engines").mkdir()
    with pytest.raises(ConfigError, match="engines is no role's") as caught:
        CurveKeys.load(own)
    assert caught.value.field == "bus.curve_dir"


def test_what_cannot_be_read_now_changes_nothing(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, key = put(own, "a", "trusted"), key_of(own, "a")
    trust = Trust(own)
    file.unlink()

    def fail(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", fail)
        assert trust.refresh() == set() and trust.roles(key) == {Role.SERVICE}
    assert trust.refresh() == {key}


def test_a_directory_may_be_replaced_by_another_and_may_end(own: Path) -> None:
    put(own, "a", "trusted")
    trust, key = Trust(own), key_of(own, "a")
    (own / "trusted").rename(own / "old")
    assert trust.refresh() == set() and trust.roles(key), "between two renames"
    (own / "old").rename(own / "trusted")
    assert trust.refresh() == set()
    shutil.rmtree(own / "trusted")
    trust.refresh()
    assert trust.refresh() == {key}


def test_keys_of_a_mesh_trust_who_calls_them_as_what_he_is(tmp_path: Path) -> None:
    root = create_mesh_keys(tmp_path / "keys")
    roles = ("index", "engine", "router", "gateway", "operator")
    keys = {role: CurveKeys.load(root / role).public.decode() for role in roles}
    assert len(set(keys.values())) == 5
    trusted = {
        role: {caller for caller in roles if Trust(root / role).roles(keys[caller]) == {Role(caller)}}
        for role in roles
    }
    assert trusted == {
        "index": {"engine", "router", "gateway", "operator"},
        "engine": {"index", "router", "operator"},
        "router": {"gateway"},
        "gateway": set(),
        "operator": set(),
    }
    assert all(path.stat().st_mode & 0o077 == 0 for path in [root, *(root / role for role in roles)])
    assert all((root / role / "service.key_secret").stat().st_mode & 0o777 == 0o600 for role in roles)
    assert keys_of_role(root, "router") == root / "router"
    assert keys_of_role(root / "router", "gateway") == root / "router"


def test_keys_of_a_mesh_are_made_once_and_what_was_taken_away_stays_away(tmp_path: Path) -> None:
    root = create_mesh_keys(tmp_path / "keys")
    before = (root / "engine" / "service.key_secret").read_bytes()
    (root / "index" / "trusted" / "engine" / "engine.key").unlink()
    shutil.rmtree(root / "gateway")
    create_mesh_keys(root)
    assert (root / "engine" / "service.key_secret").read_bytes() == before
    assert not (root / "index" / "trusted" / "engine" / "engine.key").exists()
    anew = CurveKeys.load(root / "gateway").public.decode()
    assert Trust(root / "router").roles(anew) == {Role.GATEWAY}
