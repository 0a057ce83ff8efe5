"""``microserve drain``: asks one engine to leave, says what it waits for, and fails with a clear line."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from microserve.protocol.bus.curve import create_keys
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.command.drain import DrainFailed, drain
from microserve.services.command.main import main
from tests.support.engine.engine_client import EngineClient
from tests.support.engine.engine_world import EngineWorld, engine_world, make_settings
from tests.support.router.router_world import eventually, in_loop

PROMPT = list(range(10, 31))
PARAMS = SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True)


def absent_address() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


async def start(client: EngineClient) -> None:
    await client.call(wire.Accepted, wire.StartGenerate, "r", 0, PARAMS, 60.0, tokens=PROMPT)


async def check_gone(world: EngineWorld) -> None:
    await world.ended()
    assert not world.task.cancelled() and world.task.exception() is None


@in_loop
async def test_it_waits_for_what_runs_and_says_so() -> None:
    async with engine_world() as world, EngineClient(world.bus, world.lifecycle.address) as client:
        await start(client)
        lines: list[str] = []

        def tell(line: str) -> None:
            lines.append(line)
            world.gate.set()

        await drain(world.settings, "e", None, tell)
        assert lines[0] == "engine e drains: 1 requests left"
        assert lines[-1] == "engine e has left"
        await check_gone(world)


@pytest.mark.parametrize("keys", [False, True])
def test_an_idle_engine_goes_at_once_with_or_without_keys(keys: bool, tmp_path: Path) -> None:
    directory = ""
    if keys:
        create_keys(tmp_path / "keys")
        directory = str(tmp_path / "keys")

    @in_loop
    async def main() -> None:
        async with engine_world(curve_dir=directory) as world:
            lines: list[str] = []
            await drain(world.settings, "e", 15.0, lines.append)
            assert lines[-1] == "engine e has left"
            await check_gone(world)

    main()


@in_loop
async def test_an_unknown_engine_is_named_with_those_that_are_there() -> None:
    async with engine_world() as world:
        with pytest.raises(DrainFailed, match=r"^no engine nobody in the mesh \(there are: e\)$"):
            await drain(world.settings, "nobody", 10.0, lambda line: None)
        assert not world.core.state.draining


@in_loop
async def test_an_engine_that_takes_longer_than_the_bound() -> None:
    async with engine_world() as world, EngineClient(world.bus, world.lifecycle.address) as client:
        await start(client)
        with pytest.raises(DrainFailed, match=r"^engine e has not left within 0\.5 s$"):
            await drain(world.settings, "e", 0.5, lambda line: None)
        await eventually(lambda: world.core.state.draining, "it goes on to drain")


@in_loop
async def test_without_an_index_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("microserve.services.command.drain.INDEX_TIMEOUT_S", 0.2)
    address = absent_address()
    with pytest.raises(DrainFailed, match=f"^the index at {address} does not answer$"):
        await drain(make_settings(address), "e", 10.0, lambda line: None)


def test_the_command_exits_1_with_one_line() -> None:
    address = absent_address()
    arguments = ["drain", "e", "--timeout", "0.3", "--set", f"index.address={address}"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert result.stderr == f"Error: the index at {address} does not answer\n"


def test_wrong_settings_exit_2(tmp_path: Path) -> None:
    for arguments in (["--set", f"bus.curve_dir={tmp_path}"], ["--timeout", "0"], ["--set", "bus.x=1"]):
        assert CliRunner().invoke(main, ["drain", "e", *arguments]).exit_code == 2
