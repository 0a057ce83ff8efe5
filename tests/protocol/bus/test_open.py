"""From settings to a bus: whose key is expected at which address."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import CurveKeys, create_keys
from microserve.protocol.bus.open import open_bus
from microserve.protocol.errors import ConfigError
from microserve.protocol.settings.settings import Settings
from microserve.protocol.settings.sources import load_settings

INDEX, ROUTER, OTHER = "tcp://10.0.0.1:7100", "tcp://10.0.0.2:7101", "tcp://10.0.0.3:7101"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A directory with a pair of its own; those of others are beside it, by their names."""
    for name in ("index", "router", "r0", "r1", "own"):
        create_keys(tmp_path / name)
    return tmp_path / "own"


def know(own: Path, *names: str) -> None:
    for name in names:
        shutil.copy(own.parent / name / "service.key", own / f"{name}.key")


def settings(own: Path | None, *overrides: str) -> Settings:
    directory = [f"bus.curve_dir={own}"] if own else []
    return load_settings(
        overrides=[*directory, f"index.address={INDEX}", f"router.address={ROUTER}", *overrides]
    )


def expected(settings: Settings, role: str = "gateway") -> dict[str, str]:
    """Directory name of the pair whose key is expected, by address."""
    root = Path(settings.bus.curve_dir).parent
    names = {CurveKeys.load(each).public.decode(): each.name for each in root.iterdir()}

    async def look() -> dict[str, str]:
        bus = open_bus(settings, role)
        try:
            assert bus.keys is not None
            return {address: names[key] for address, key in bus.keys.servers.items()}
        finally:
            bus.close()

    return asyncio.run(look())


def test_who_shares_one_pair_needs_no_more(own: Path) -> None:
    assert expected(settings(own)) == {}


def test_the_indexs_and_the_routers_keys_are_files_of_the_directory(own: Path) -> None:
    know(own, "index", "router")
    assert expected(settings(own)) == {INDEX: "index", ROUTER: "router"}
    routers = f'gateway.routers=["{ROUTER}", "{OTHER}"]'
    assert expected(settings(own, routers)) == {INDEX: "index", ROUTER: "router", OTHER: "router"}


def test_routers_with_different_pairs_are_named_in_order(own: Path) -> None:
    know(own, "r0", "r1")
    overrides = [f'gateway.routers=["{OTHER}", "{ROUTER}"]', 'gateway.router_keys=["r0", "r1"]']
    assert expected(settings(own, *overrides)) == {OTHER: "r0", ROUTER: "r1"}


def test_a_key_that_is_named_must_be_there(own: Path) -> None:
    with pytest.raises(ConfigError, match=r"no r0\.key") as raised:
        expected(settings(own, 'gateway.router_keys=["r0"]'))
    assert raised.value.field == "gateway.router_keys"


def test_one_file_of_settings_serves_those_who_call_no_router(own: Path) -> None:
    know(own, "index")
    names = 'gateway.router_keys=["r0"]'
    assert expected(settings(own, names), role="router") == {INDEX: "index"}


def test_a_key_for_each_router(own: Path) -> None:
    with pytest.raises(ConfigError, match="one key for each of 1 routers, names 2"):
        settings(own, 'gateway.router_keys=["r0", "r1"]')


def test_without_a_directory_there_are_no_keys() -> None:
    async def look() -> None:
        bus = open_bus(settings(None), "router")
        assert bus.keys is None and bus.public_key == ""
        bus.close()

    asyncio.run(look())
