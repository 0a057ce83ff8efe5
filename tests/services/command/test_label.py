"""``microserve label``: wrong flags, what is listed, and what it says of routers, with a real index."""

from __future__ import annotations

import asyncio

import pytest
import structlog
from click.testing import CliRunner, Result

from microserve.protocol.messages.index import Register, Registered, Watch
from microserve.protocol.messages.strategy.control import ControlState, EngineLabels
from microserve.services.command.label import rows
from microserve.services.command.main import main
from microserve.services.command.shared.control_client import ControlClient
from tests.support.index.index_service import Index, Peer, with_index
from tests.support.index.index_world import World, make_info


def run(*words: str) -> Result:
    return CliRunner().invoke(main, ["label", *words])


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["e"],
        ["e", "x", "--reset"],
        ["e", "--list"],
        ["--list", "--reset"],
        ["e", "two words"],
        ["e", "any", "decode"],
        ["e", "x", "x"],
        ["e", ""],
        ["e", "x", "--timeout", "0"],
        ["e", "x", "--config", "absent.toml"],
    ],
)
def test_wrong_flags_exit_2(words: list[str]) -> None:
    assert run(*words).exit_code == 2


def test_the_table_says_where_labels_come_from() -> None:
    present = [
        make_info("b", labels=[]),
        make_info("a", labels=["decode"]),
        make_info("c", labels=["x", "y"]),
    ]
    chosen = [EngineLabels("c", []), EngineLabels("gone", ["prefill"])]
    assert rows(present, chosen) == [
        "ENGINE  LABELS   SET BY    ANNOUNCED",
        "a       decode   engine    decode",
        "b       any      engine    any",
        "c       any      operator  x y",
        "gone    prefill  operator  (not in the mesh)",
    ]
    assert rows([], []) == ["ENGINE  LABELS  SET BY  ANNOUNCED"]


class Router:
    """Watches as a router does; ``follows`` what it is told, or not."""

    def __init__(self, peer: Peer, name: str, *, follows: bool) -> None:
        self.peer = peer
        self.version = 0
        self.task = asyncio.create_task(self._run(name, follows))

    async def _run(self, name: str, follows: bool) -> None:
        while True:
            told = [reply.version for reply in self.peer.replies if isinstance(reply, ControlState)]
            self.version = max([*told, self.version]) if follows else 0
            self.peer.send(Watch(name, self.version))
            await asyncio.sleep(0.01)


def test_it_labels_lists_resets_and_fails_loudly() -> None:
    async def test(world: World, index: Index) -> None:
        async def command(*words: str) -> Result:
            return await asyncio.to_thread(run, *words, "--index", index.address)

        peer = index.peer()
        for engine in ("e1", "e2"):
            await peer.ask(Registered, Register(1, make_info(engine, labels=["decode"])))
        done = await command("e1", "prefill", "--reason", "busy")
        assert (done.exit_code, done.output.splitlines()) == (
            0,
            [
                "label e1 prefill: version 1",
                "  no router watches this index; they take it over when they come",
            ],
        )
        good = Router(index.peer(), "r1", follows=True)
        try:
            done = await command("e2", "any")
            assert (done.exit_code, done.output.splitlines()) == (
                0,
                ["label e2 any: version 2", "  r1  version 2"],
            )
            done = await command("e3", "prefill")
            assert done.exit_code == 1
            assert "no engine e3 in the mesh (there are: e1, e2)" in done.output
            assert (await command("e3", "prefill", "--force")).exit_code == 0
            assert (await command("--list")).output.splitlines()[1:] == [
                "e1      prefill  operator  decode",
                "e2      any      operator  decode",
                "e3      prefill  operator  (not in the mesh)",
            ]
            client = ControlClient(world.bus, index.address)
            try:
                assert await client.labels() == [["prefill"], []], "what a dry run goes by"
            finally:
                client.close()
            done = await command("e1", "--reset")
            assert (done.exit_code, done.output.splitlines()[0]) == (0, "label e1 reset: version 4")
            done = await command("e1", "--reset")
            assert done.exit_code == 1
            assert "engine: no labels are set for e1 (they are for: e2, e3)" in done.output
            late = Router(index.peer(), "r2", follows=False)
            try:
                done = await command("e1", "decode", "--timeout", "0.3")
                assert done.exit_code == 1
                assert "Error: not applied within 0.3 s by: r2" in done.output
            finally:
                late.task.cancel()
            history = await asyncio.to_thread(
                CliRunner().invoke, main, ["strategy", "history", "--index", index.address]
            )
            assert "label e1 prefill    local  busy" in history.output
            assert "label e2 any" in history.output
            assert "unlabel e1" in history.output
            listed = await asyncio.to_thread(
                CliRunner().invoke, main, ["strategy", "list", "--index", index.address]
            )
            assert "engine e2  labels any" in listed.output
        finally:
            good.task.cancel()

    with structlog.testing.capture_logs():  # they would be among what the command prints
        with_index(test)
