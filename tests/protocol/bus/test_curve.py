"""Who may speak on the bus."""

from __future__ import annotations

import asyncio
import shutil
import stat
from pathlib import Path

import pytest

from microserve.protocol.bus.curve import CurveKeys, check_exposure, create_keys
from microserve.protocol.bus.transport import ZmqBus
from microserve.protocol.errors import ConfigError

ANY = "tcp://127.0.0.1:0"


def refused(directory: Path) -> ConfigError:
    with pytest.raises(ConfigError) as error:
        CurveKeys.load(directory)
    return error.value


def trust(who: Path, whom: Path, name: str) -> None:
    shutil.copy(whom / "service.key", who / "trusted" / f"{name}.key")


def test_pair_is_private_and_trusts_itself(tmp_path: Path) -> None:
    keys = create_keys(tmp_path / "keys")

    assert stat.S_IMODE((tmp_path / "keys" / "service.key_secret").stat().st_mode) == 0o600
    assert keys.public.decode() in (tmp_path / "keys" / "trusted" / "service.key").read_text()
    assert CurveKeys.load(tmp_path / "keys") == keys
    assert keys.secret.decode() not in (tmp_path / "keys" / "service.key").read_text()


def test_pair_is_never_overwritten(tmp_path: Path) -> None:
    keys = create_keys(tmp_path)
    with pytest.raises(ConfigError, match="exists"):
        create_keys(tmp_path)

    assert CurveKeys.load(tmp_path) == keys


def test_missing_pair_is_refused(tmp_path: Path) -> None:
    error = refused(tmp_path)

    assert error.field == "bus.curve_dir"
    assert "service.key_secret" in error.detail


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660])
def test_secret_that_others_can_read_is_refused(tmp_path: Path, mode: int) -> None:
    create_keys(tmp_path)
    (tmp_path / "service.key_secret").chmod(mode)

    assert "readable by others" in refused(tmp_path).detail


@pytest.mark.parametrize("content", ["", "no key at all", "metadata\ncurve\n    public-key = 'x'\n"])
def test_damaged_pair_is_refused(tmp_path: Path, content: str) -> None:
    create_keys(tmp_path)
    (tmp_path / "service.key_secret").write_text(content)

    assert refused(tmp_path).field == "bus.curve_dir"


def test_pair_that_trusts_nobody_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path)
    shutil.rmtree(tmp_path / "trusted")

    assert "nobody could connect" in refused(tmp_path).detail


def test_public_key_in_the_place_of_the_secret_is_refused(tmp_path: Path) -> None:
    create_keys(tmp_path)
    (tmp_path / "service.key_secret").write_text((tmp_path / "service.key").read_text())

    assert "holds no secret key" in refused(tmp_path).detail


@pytest.mark.parametrize(
    "address",
    [
        "tcp://127.0.0.1:7100",
        "tcp://127.9.9.9:0",
        "tcp://localhost:1",
        "tcp://[::1]:7100",
        "ipc:///run/x",
        "inproc://x",
    ],
)
def test_loopback_needs_no_keys(address: str) -> None:
    check_exposure(address, None)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://0.0.0.0:7100",
        "tcp://*:7100",
        "tcp://[::]:7100",
        "tcp://10.0.0.1:7100",
        "tcp://eth0:7100",
        "tcp://127.0.0.1.example.com:7100",
        "tcp://",
        "tipc://{5560,0,0}",
        "udp://10.0.0.1:1",
        "nonsense",
    ],
)
def test_anything_else_needs_keys(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        check_exposure(address, None)

    assert error.value.field == "bus.curve_dir"
    check_exposure(address, create_keys(tmp_path))


async def is_served(server_keys: CurveKeys, client_keys: CurveKeys | None, *, server_key: str = "") -> bool:
    """Until the server answers that client."""
    return await served(server_keys, client_keys, server_key=server_key, num_rounds=1 << 62)


async def served(
    server_keys: CurveKeys, client_keys: CurveKeys | None, *, server_key: str = "", num_rounds: int = 20
) -> bool:
    """Whether the server answers that client before it has answered one of its own ``num_rounds`` times."""
    buses = [ZmqBus(keys=keys, linger_s=0) for keys in (server_keys, client_keys, server_keys)]
    try:
        answered, num_answers = asyncio.Event(), 0

        def answer(peer: bytes, frames: list[bytes]) -> None:
            server.send(peer, frames)

        def again(frames: list[bytes]) -> None:
            nonlocal num_answers
            num_answers += 1
            friend.send(frames)

        server = buses[0].server(ANY, answer)
        client = buses[1].client(server.address, lambda frames: answered.set(), server_key=server_key)
        client.send([b"hello"])
        friend = buses[2].client(server.address, again)
        friend.send([b"hello"])
        async with asyncio.timeout(30):
            while num_answers < num_rounds and not answered.is_set():
                await asyncio.sleep(0.005)
        return answered.is_set()
    finally:
        for bus in buses:
            bus.close()


def test_trusted_key_is_let_in(tmp_path: Path) -> None:
    index, engine = create_keys(tmp_path / "index"), create_keys(tmp_path / "engine")
    trust(tmp_path / "index", tmp_path / "engine", "engine")

    assert asyncio.run(is_served(index, engine, server_key=index.public.decode()))


def test_services_that_share_a_pair_need_no_server_key(tmp_path: Path) -> None:
    keys = create_keys(tmp_path)

    assert asyncio.run(is_served(keys, CurveKeys.load(tmp_path)))


def test_unknown_key_is_kept_out(tmp_path: Path) -> None:
    index, stranger = create_keys(tmp_path / "index"), create_keys(tmp_path / "stranger")

    assert not asyncio.run(served(index, stranger, server_key=index.public.decode()))


def test_peer_without_keys_is_kept_out(tmp_path: Path) -> None:
    assert not asyncio.run(served(create_keys(tmp_path), None))


def test_server_that_is_not_who_it_should_be_gets_nothing(tmp_path: Path) -> None:
    impostor, engine = create_keys(tmp_path / "impostor"), create_keys(tmp_path / "engine")
    trust(tmp_path / "impostor", tmp_path / "engine", "engine")
    expected = create_keys(tmp_path / "index").public.decode()

    assert not asyncio.run(served(impostor, engine, server_key=expected))


def test_events_are_for_trusted_subscribers_only(tmp_path: Path) -> None:
    engine, reader = create_keys(tmp_path / "engine"), create_keys(tmp_path / "reader")
    stranger = create_keys(tmp_path / "stranger")
    trust(tmp_path / "engine", tmp_path / "reader", "reader")

    async def test() -> tuple[int, int]:
        buses = [ZmqBus(keys=keys, linger_s=0) for keys in (engine, reader, stranger)]
        try:
            heard, overheard = asyncio.Event(), list[list[bytes]]()
            publisher = buses[0].publisher(ANY)
            key = engine.public.decode()
            buses[2].subscriber(publisher.address, overheard.append, server_key=key)
            buses[1].subscriber(publisher.address, lambda frames: heard.set(), server_key=key)
            async with asyncio.timeout(30):
                while not heard.is_set():
                    publisher.send([b"event"])
                    await asyncio.sleep(0.005)
            return heard.is_set(), len(overheard)
        finally:
            for bus in buses:
                bus.close()

    assert asyncio.run(test()) == (True, 0)


def test_bus_names_the_key_that_its_peers_need(tmp_path: Path) -> None:
    keys = create_keys(tmp_path)

    async def public_keys() -> tuple[str, str]:
        secured, open_bus = ZmqBus(keys=keys), ZmqBus()
        try:
            return secured.public_key, open_bus.public_key
        finally:
            secured.close()
            open_bus.close()

    assert asyncio.run(public_keys()) == (keys.public.decode(), "")
