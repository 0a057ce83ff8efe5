"""The index's metrics, as they are now. Called in the loop, by the metrics port, at most once a second."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from microserve.protocol.bus.transport import Bus
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.service import read_service
from microserve.protocol.metrics.table import index as table
from microserve.protocol.process.version import own_version
from microserve.services.index.checks import CheckDesk
from microserve.services.index.control import ControlDesk
from microserve.services.index.membership import Membership
from microserve.services.index.missing import Missing
from microserve.services.index.prefixes import PrefixIndexes
from microserve.services.links.feed import Feed


def read_index(
    readings: Readings,
    membership: Membership,
    missing: Missing,
    prefixes: PrefixIndexes,
    feeds: Mapping[str, Feed],
    control: ControlDesk,
    checks: CheckDesk,
    now: float,
) -> None:
    models = Counter(member.info.model for member in membership.members())
    readings.add_each(table.MEMBERS, dict(models) or {"": 0})
    readings.add_each(table.MISSING, dict(Counter(each.code for each in missing.report(now))))
    readings.add(table.BLOCKS, prefixes.num_blocks)
    readings.add(table.NBYTES, prefixes.nbytes)
    readings.add(table.MAX_NBYTES, prefixes.max_nbytes)
    for engine_id, feed in feeds.items():
        lag = feed.lag
        readings.add(table.FEED_LIVE, lag.live, engine_id)
        readings.add(table.FEED_SILENT, lag.silent_s, engine_id)
    readings.add(table.CONTROL_VERSION, control.version)
    readings.add(table.CONTROL_DURABLE, control.is_durable)
    readings.add(table.BEHIND, control.num_behind)
    readings.add(table.SUSPECTS, len(checks.suspects()))


def counted(feed: Feed) -> dict[str, int]:
    counters = feed.counters
    return {
        "resyncs": counters.snapshots,
        "gaps": counters.gaps,
        "skipped_events": feed.num_skipped,
    }


def counters_of(own: Mapping[str, int], feeds: Iterable[Feed], prefixes: PrefixIndexes) -> Counter[str]:
    """By name, of the service and of what it follows."""
    counters = Counter(own)
    for feed in feeds:
        counters.update(counted(feed))
    counters.update(prefixes.counters)
    return counters


def read_counters(readings: Readings, counters: Mapping[str, int], bus: Bus) -> None:
    """``counters``: as :func:`counters_of`."""
    readings.add_each(table.FEED_EVENTS, {name: counters.get(name, 0) for name in ("gaps", "resyncs")})
    readings.add(table.FEED_EVENTS, counters.get("skipped_events", 0), "skipped")
    readings.add(table.JOINED, counters.get("joined", 0))
    readings.add_each(table.LOST, {how: counters.get(f"lost_{how}", 0) for how in ("silent", "stuck")})
    refused = {
        name.removeprefix("refused_"): count
        for name, count in counters.items()
        if name.startswith("refused_")
    }
    readings.add_each(table.REFUSED, refused)
    readings.add(table.REJECTED, counters.get("frames_rejected", 0))
    readings.add(table.LOOKUPS, counters.get("lookups", 0))
    readings.add(table.INFO, 1, own_version())
    read_service(readings, bus)
