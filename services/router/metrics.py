"""A router's metrics, as they are now. Called in the loop, by the metrics port, at most once a second."""

from __future__ import annotations

from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.check import OUTCOMES
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.service import read_service
from microserve.protocol.metrics.table import router as table
from microserve.protocol.process.version import own_version
from microserve.protocol.settings.settings import RouterSettings
from microserve.services.router.check.check import SelfCheck
from microserve.services.router.engines.load import Links
from microserve.services.router.engines.prefix import PrefixReplica
from microserve.services.router.engines.registry import Registry
from microserve.services.router.gateways import Gateways
from microserve.services.router.rollout.book import StrategyBook
from microserve.services.router.rollout.control import StrategyControl
from microserve.services.router.serving.serving import Serving

MAX_LINKS = 256
"""Pairs of engines, those that were measured first."""


def router_readings(
    router_id: str,
    settings: RouterSettings,
    bus: Bus,
    serving: Serving,
    registry: Registry,
    prefixes: PrefixReplica,
    strategies: StrategyBook,
    control: StrategyControl,
    gateways: Gateways,
    check: SelfCheck,
) -> Readings:
    readings = Readings({"router": router_id})
    readings.add(table.INFO, 1, own_version(), settings.default_strategy)
    readings.add(table.LIVE, len(serving))
    readings.add(table.MAX_LIVE, settings.max_requests)
    readings.add(table.HELD_BACK, serving.turnstile.num_waiting)
    readings.add(table.GATEWAYS, len(gateways))
    readings.add(table.RECORDS, len(serving.records))
    serving.tally.read(readings)
    joined, usable = registry.joined(), registry.usable()
    readings.add_each(table.ENGINES, {"usable": len(usable), "draining": len(joined) - len(usable)})
    _read_prefixes(readings, prefixes)
    _read_links(readings, serving.book.links)
    _read_strategies(readings, strategies, control)
    _read_checks(readings, check)
    read_service(readings, bus)
    return readings


def _read_checks(readings: Readings, check: SelfCheck) -> None:
    book = check.book
    counts = {outcome: book.num_by_outcome[outcome] for outcome in OUTCOMES}
    readings.add_each(table.CHECKS, counts | {"skipped": book.num_skipped})
    readings.add(table.CHECK_SECONDS, book.took_s)
    readings.add(table.CHECK_TOKENS, book.num_tokens)
    if (age_s := check.age_s) is not None:
        readings.add(table.CHECK_AGE, age_s)
    readings.add(table.SUSPECTS, len(check.suspects))


def _read_prefixes(readings: Readings, prefixes: PrefixReplica) -> None:
    for engine_id, feed in prefixes.feeds():
        lag, counters = feed.lag, feed.counters
        readings.add(table.FEED_LIVE, lag.live, engine_id)
        readings.add(table.FEED_SILENT, lag.silent_s, engine_id)
        for what, count in (
            ("gaps", counters.gaps),
            ("resyncs", counters.snapshots),
            ("skipped", feed.num_skipped),
            ("rejected", feed.num_rejected),
        ):
            readings.add(table.FEED_EVENTS, count, engine_id, what)
    index = prefixes.index
    readings.add(table.INDEX_BLOCKS, index.num_blocks if index is not None else 0)
    readings.add(table.INDEX_NBYTES, index.nbytes if index is not None else 0)


def _read_links(readings: Readings, links: Links) -> None:
    for source, target in links.measured()[:MAX_LINKS]:
        readings.add(table.LINK_GOODPUT, links.goodput(source, target), source, target)


def _read_strategies(readings: Readings, book: StrategyBook, control: StrategyControl) -> None:
    readings.add(table.CONTROL_VERSION, control.version)
    for name in book.names:
        published = book.published.get(name)
        if published is None:
            readings.add(table.VERSIONS, 1, name, "0", "stable")
            continue
        readings.add(table.VERSIONS, 1, name, str(published.stable.version), "stable")
        for strategy, share, kind in (
            (published.canary, published.share, "canary"),
            (published.shadow, published.shadow_share, "shadow"),
        ):
            if strategy is not None:
                readings.add(table.VERSIONS, 1, name, str(strategy.version), kind)
                readings.add(table.SHARES, share, name, kind)
    for score in control.shadows.scores():
        key = (score.strategy, str(score.version))
        priced = score.num_decisions - score.num_errors
        for outcome, count in (
            ("agreed", score.num_agreed),
            ("differed", priced - score.num_agreed),
            ("failed", score.num_errors),
        ):
            readings.add(table.SHADOW_DECISIONS, count, *key, outcome)
        readings.add(table.SHADOW_TTFT, score.ttft_s, *key, "shadow")
        readings.add(table.SHADOW_TTFT, score.served_ttft_s, *key, "served")
