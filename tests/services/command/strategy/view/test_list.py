"""``microserve strategy list``: every strategy, what serves under its name, and where it does not."""

from __future__ import annotations

import asyncio

from click.testing import CliRunner

from microserve.protocol.messages.index import Members, Watch
from microserve.protocol.messages.strategy.control import Change, Changed, StrategyServed, VersionFault
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.command.main import main
from microserve.services.router.service import load_strategies
from tests.support.index.index_service import Index, with_index
from tests.support.index.index_world import World

OWN = load_strategies(RouterSettings()).serves()
"""What a router says when nothing has been published."""


async def listed(index: Index) -> list[str]:
    words = ["strategy", "list", "--index", index.address]
    done = await asyncio.to_thread(CliRunner().invoke, main, words)
    assert done.exit_code == 0, done.output
    return [" ".join(line.split()) for line in done.output.splitlines()]


def test_with_nothing_published_it_lists_what_the_routers_came_with() -> None:
    async def test(world: World, index: Index) -> None:
        lines = await listed(index)
        assert lines[1:] == ["no router watches this index: what they come with is not known here"]
        await index.peer().ask(Members, Watch("r1", 0, [], [], OWN, "auto"))
        lines = await listed(index)
        assert len(OWN) > 10
        for each in OWN:
            mark = " (default)" if each.strategy == "auto" else ""
            assert f"{each.strategy} what the routers came with{mark}" in lines
        assert lines[-1] == "r1 version 0"

    with_index(test)


def test_it_says_what_is_published_where_it_is_not_and_what_was_suspended() -> None:
    async def test(world: World, index: Index) -> None:
        await index.peer().ask(Changed, Change(1, "c", "publish", "auto", source="x"))
        first = [StrategyServed("auto", 1, [1]), StrategyServed("own", 0, [0])]
        fault = VersionFault("auto", 1, "it held the router")
        await index.peer().ask(Members, Watch("r1", 1, [], [], first, "auto"))
        await index.peer().ask(Members, Watch("r2", 1, [fault], [], first[:1], "balanced"))
        lines = await listed(index)
        at = lines.index("auto (default on r1)")
        assert lines[at + 1 : at + 4] == [
            "stable (what the routers came with) 100%",
            "suspended on r1: version 1 has hung there, data_parallel serves instead",
            "suspended on r2: version 1 has hung there, data_parallel serves instead",
        ]
        at = lines.index("own what the routers came with")
        assert lines[at + 1 : at + 3] == [
            "only on r1",
            "suspended on r1: version (own) has hung there, data_parallel serves instead",
        ]
        assert "does not run auto 1: it held the router" in lines

    with_index(test)
