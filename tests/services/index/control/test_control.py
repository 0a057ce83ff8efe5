"""Control over real sockets: published to watchers, repeated until they have it, acknowledged, refused."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from typing import Any

import structlog

from microserve.protocol import log
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.index import IndexFailed, Members, Watch
from microserve.protocol.messages.strategy.control import (
    Change,
    Changed,
    ControlHistory,
    ControlRecords,
    ControlReport,
    ControlState,
    ControlStatus,
    VersionFault,
)
from microserve.protocol.messages.strategy.scores import Ramp
from microserve.services.index.control import ControlDesk
from microserve.services.index.control_log import ControlLog
from tests.support.index.index_service import Index, Peer, with_index
from tests.support.index.index_world import World

_IDS = itertools.count()


def change(kind: str = "publish", strategy: str = "mine", **fields: Any) -> Change:
    fields.setdefault("source", "code" if kind == "publish" else "")
    return Change(next(_IDS) + 1, f"id {next(_IDS)}", kind, strategy, **fields)


async def reported(peer: Peer, condition: Callable[[ControlReport], bool]) -> ControlReport:
    async with asyncio.timeout(30):
        while True:
            report = await peer.ask(ControlReport, ControlStatus(1))
            if condition(report):
                return report
            await asyncio.sleep(0.002)


def states(peer: Peer) -> list[ControlState]:
    return [reply for reply in peer.replies if isinstance(reply, ControlState)]


def test_a_change_reaches_every_watching_router_at_once_and_nobody_else() -> None:
    async def test(world: World, index: Index) -> None:
        router, other, drain, publisher = (index.peer() for _ in range(4))
        await router.ask(Members, Watch("r1", 0))
        await other.ask(Members, Watch("r2", 0))
        await drain.ask(Members, Watch("drain"))
        asked = change()
        changed = await publisher.ask(Changed, asked)
        assert changed == Changed(asked.call_id, 1)
        await world.until(lambda: states(router) != [] and states(other) != [])
        [state] = states(router)
        assert state.version == 1
        assert [entry.strategy for entry in state.entries] == ["mine"]
        await drain.ask(Members, Watch("drain"))
        assert states(drain) == []

    with_index(test)


def test_a_router_s_clock_is_judged_by_its_message_that_was_quickest() -> None:
    async def test(world: World, index: Index) -> None:
        router, asker = index.peer(), index.peer()
        late = [time.time() - 50.0, time.time() + 3600.0, time.time() - 70.0]
        for wall_s in late:
            said = HostFacts(wall_s, 10, 1024)
            await router.ask(Members, Watch("r1", 0, gateways=["http://g"], version="1", host=said))
        [known] = (await asker.ask(ControlReport, ControlStatus(1))).routers
        assert (known.gateways, known.software, known.host.wall_s) == (["http://g"], "1", late[-1])
        assert 3500.0 < known.clock_off_s <= 3600.0

    with_index(test)


def test_a_watcher_that_has_an_older_state_is_told_until_it_has_the_newest() -> None:
    async def test(world: World, index: Index) -> None:
        publisher, router = index.peer(), index.peer()
        await publisher.ask(Changed, change())
        for _ in range(3):  # as if what it was sent had been lost
            assert (await router.ask(ControlState, Watch("r1", 0))).version == 1
        router.send(Watch("r1", 1))
        report = await reported(publisher, lambda report: report.routers[0].version == 1)
        assert [router.router_id for router in report.routers] == ["r1"]
        count = len(states(router))
        await router.ask(ControlReport, ControlStatus(5))
        assert len(states(router)) == count, "it has it, and is told no more"

    with_index(test)


def test_a_router_that_falls_silent_is_forgotten() -> None:
    async def test(world: World, index: Index) -> None:
        publisher, router = index.peer(), index.peer()
        router.send(Watch("r1", 0))
        await reported(publisher, lambda report: len(report.routers) == 1)
        await reported(publisher, lambda report: report.routers == [])

    with_index(test, interval_s=0.02, liveness=5)


def test_a_refusal_names_the_field_and_is_an_event() -> None:
    async def test(world: World, index: Index) -> None:
        publisher = index.peer()
        with structlog.testing.capture_logs() as logs:
            failed = await publisher.ask(IndexFailed, change("promote"))
        assert (failed.code, failed.field) == ("invalid_request", "strategy")
        [event] = [entry for entry in logs if entry["event"] == log.STRATEGY_REFUSED]
        assert (event["who"], event["kind"], event["field"]) == ("local", "promote", "strategy")

    with_index(test)


def test_every_change_is_an_audit_event_and_a_record() -> None:
    async def test(world: World, index: Index) -> None:
        publisher = index.peer()
        with structlog.testing.capture_logs() as logs:
            await publisher.ask(Changed, change(reason="why"))
            await publisher.ask(Changed, change("rollback", reason="slow"))
        events = [entry for entry in logs if entry["event"].startswith("strategy.")]
        assert [(e["event"], e["version"], e["reason"]) for e in events] == [
            (log.STRATEGY_PUBLISHED, 1, "why"),
            (log.STRATEGY_ROLLED_BACK, 2, "slow"),
        ]
        assert {event["who"] for event in events} == {"local"}
        history = await publisher.ask(ControlRecords, ControlHistory(7))
        assert [record.kind for record in history.records] == ["rollback", "publish"]

    with_index(test)


def test_a_fault_of_a_version_in_force_takes_it_back_once() -> None:
    async def test(world: World, index: Index) -> None:
        publisher = index.peer()
        await publisher.ask(Changed, change(source="good"))
        await publisher.ask(Changed, change(source="bad"))
        fault = VersionFault("mine", 2, "it failed")
        for name in ("r1", "r2", "r1"):
            index.peer().send(Watch(name, 2, [fault]))
        report = await reported(publisher, lambda report: report.state.version >= 3)
        assert report.state.version == 3
        stable = report.state.entries[0].stable
        assert stable is not None
        assert (stable.version, stable.source) == (1, "good")
        await reported(publisher, lambda report: len(report.routers) >= 2)
        history = (await publisher.ask(ControlRecords, ControlHistory(7))).records
        assert [record.version for record in history] == [3, 2, 1]
        assert history[0].who.startswith("router r")
        assert history[0].reason == "it failed"

    with_index(test)


def test_a_version_that_was_at_fault_never_returns_also_when_another_took_its_place() -> None:
    """Version 2 hangs, 3 is published meanwhile and fails: back to 1, also after a restart of the index."""

    async def test(world: World, index: Index) -> None:
        publisher, router = index.peer(), index.peer()
        for source in ("good", "hangs", "fails"):
            await publisher.ask(Changed, change(source=source))
        hangs, fails = VersionFault("mine", 2, "it hangs"), VersionFault("mine", 3, "it fails")
        router.send(Watch("r1", 3, [hangs]))
        report = await reported(publisher, lambda report: report.state.version >= 4)
        stable = report.state.entries[0].stable
        assert stable is not None
        assert stable.version == 3, "what is in force is not touched"
        router.send(Watch("r1", 4, [hangs, fails]))
        report = await reported(publisher, lambda report: report.state.version >= 5)
        stable = report.state.entries[0].stable
        assert stable is not None
        assert (stable.version, stable.source) == (1, "good")
        history = (await publisher.ask(ControlRecords, ControlHistory(7))).records
        assert [(each.version, each.reason) for each in history[:2]] == [(5, "it fails"), (4, "it hangs")]

    with_index(test)


def test_a_log_that_was_lost_uses_no_version_again() -> None:
    async def test(world: World, index: Index) -> None:
        publisher, router = index.peer(), index.peer()
        await router.ask(Members, Watch("r1", 17))
        assert (await publisher.ask(Changed, change())).version == 18
        await world.until(lambda: bool(states(router)))
        assert states(router)[-1].version == 18

    with_index(test)


def test_a_router_that_is_gone_is_waited_for_by_nobody() -> None:
    """Its silence may be long: it has said so, while it had nothing to do."""
    gone: set[bytes] = set()
    desk = ControlDesk(ControlLog(), lambda peer, reply: peer not in gone, may_publish=None)
    try:
        for peer in (b"1", b"2"):
            desk.watch(peer, Watch(f"r{peer.decode()}", 0, next_s=2.0))
        gone.add(b"1")
        desk.answer(change(), "")
        report = desk.answer(ControlStatus(1), "")
        assert isinstance(report, ControlReport)
        assert [router.router_id for router in report.routers] == ["r2"]
    finally:
        desk.close()


def test_a_router_that_has_connected_anew_counts_once_as_it_is_now() -> None:
    desk = ControlDesk(ControlLog(), lambda peer, reply: True, may_publish=None)
    try:
        for peer, version in ((b"old", 3), (b"new", 5)):
            desk.watch(peer, Watch("r", version))
        report = desk.answer(ControlStatus(1), "")
        assert isinstance(report, ControlReport)
        assert [(router.router_id, router.version) for router in report.routers] == [("r", 5)]
    finally:
        desk.close()


def test_without_the_right_nobody_publishes() -> None:
    desk = ControlDesk(ControlLog(), lambda peer, reply: True, may_publish=lambda key: key == "good")
    try:
        refused = []
        for key in ("", "bad", "good"):
            try:
                desk.answer(change(), key)
            except Exception as error:
                refused.append((key, type(error).__name__, getattr(error, "field", "")))
        assert refused == [("", "NotPermitted", "operators"), ("bad", "NotPermitted", "operators")]
        reply = desk.answer(ControlHistory(1), "bad")
        assert isinstance(reply, ControlRecords)
        assert [record.who for record in reply.records] == ["good"]
    finally:
        desk.close()


def test_a_ramp_goes_on_while_a_router_says_that_all_is_well_and_is_an_event_each_time() -> None:
    async def test(world: World, index: Index) -> None:
        publisher, router = index.peer(), index.peer()
        await publisher.ask(Changed, change(source="old"))
        ramp = Ramp([0.1, 0.5, 1.0], every_s=0.15)
        with structlog.testing.capture_logs() as logs:
            await publisher.ask(Changed, change(source="new", share=0.1, ramp=ramp))

            def is_over(report: ControlReport) -> bool:
                router.send(Watch("r1", report.state.version))
                [entry] = report.state.entries
                return entry.canary is None

            report = await reported(publisher, is_over)
        [entry] = report.state.entries
        assert entry.stable is not None
        assert (entry.stable.source, entry.ramp) == ("new", None)
        told = [
            entry for entry in logs if entry["event"] == log.STRATEGY_PUBLISHED and entry["who"] == "ramp"
        ]
        assert [(event["kind"], event["share"]) for event in told] == [("share", 0.5), ("promote", 1.0)]
        history = await publisher.ask(ControlRecords, ControlHistory(7))
        assert [(record.kind, record.who) for record in history.records[:2]] == [
            ("promote", "ramp"),
            ("share", "ramp"),
        ]
        assert history.records[2].ramp == ramp

    with_index(test)
