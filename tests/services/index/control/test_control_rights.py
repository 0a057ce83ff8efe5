"""Who may publish under CURVE: the keys in ``operators``, told apart by the connection itself."""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.curve import CurveKeys, create_keys, is_operator, peer_key
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError, InvalidRequest
from microserve.protocol.settings.settings import BusSettings, IndexSettings, Settings
from microserve.services.command.shared.control_client import control_client
from microserve.services.index.service import IndexService


def make_directories(tmp_path: Path) -> tuple[Path, Path]:
    """The services' keys and an operator's, who trust each other."""
    services, operator = tmp_path / "services", tmp_path / "operator"
    create_keys(services)
    create_keys(operator)
    (services / "trusted" / "operator.key").write_text((operator / "service.key").read_text())
    (operator / "index.key").write_text((services / "service.key").read_text())
    return services, operator


async def publish(directory: Path, address: str) -> int:
    settings = Settings(bus=BusSettings(curve_dir=str(directory)), index=IndexSettings(address=address))
    async with control_client(settings) as client:
        return await client.change("publish", "mine", source="code")


def test_only_keys_with_the_right_publish_and_other_attempts_are_events(tmp_path: Path) -> None:
    services, operator = make_directories(tmp_path)
    operator_key = CurveKeys.load(operator).public.decode()
    service_key = CurveKeys.load(services).public.decode()

    async def run() -> None:
        bus = ZmqBus(linger_s=0.1, keys=CurveKeys.load(services))
        index = IndexService(
            bus,
            address="tcp://127.0.0.1:0",
            settings=BusSettings(),
            max_nbytes=1 << 20,
            incarnation=7,
            may_publish=partial(is_operator, services),
        )
        try:
            for directory in (services, operator):  # trusted, both, and no operator yet
                with pytest.raises(InvalidRequest) as caught:
                    await publish(directory, index.address)
                assert caught.value.field == "operators"
            (services / "operators").mkdir()
            (services / "operators" / "operator.key").write_text((operator / "service.key").read_text())
            assert await publish(operator, index.address) == 1
            with pytest.raises(InvalidRequest):
                await publish(services, index.address)
            (services / "operators" / "operator.key").unlink()
            with pytest.raises(InvalidRequest):
                await publish(operator, index.address)
        finally:
            index.close()
            bus.close()

    with structlog.testing.capture_logs() as logs:
        asyncio.run(run())
    refused = [entry["who"] for entry in logs if entry["event"] == log.STRATEGY_REFUSED]
    assert refused == [service_key, operator_key, service_key, operator_key]
    published = [entry for entry in logs if entry["event"] == log.STRATEGY_PUBLISHED]
    assert [(entry["who"], entry["version"]) for entry in published] == [(operator_key, 1)]


def test_a_damaged_key_file_gives_nobody_a_right(tmp_path: Path) -> None:
    services, operator = make_directories(tmp_path)
    key = CurveKeys.load(operator).public.decode()
    assert not is_operator(services, key)
    (services / "operators").mkdir()
    (services / "operators" / "a.key").write_text("junk")
    assert not is_operator(services, key)
    (services / "operators" / "b.key").write_text((operator / "service.key").read_text())
    assert is_operator(services, key)
    assert not is_operator(services, "")


def test_the_indexs_key_is_read_where_it_is_not_ours(tmp_path: Path) -> None:
    services, operator = make_directories(tmp_path)
    assert peer_key(services, "index") == ""
    assert peer_key(operator, "index") == CurveKeys.load(services).public.decode()
    (operator / "index.key").write_text("junk")
    with pytest.raises(ConfigError, match=r"index\.key"):
        peer_key(operator, "index")
