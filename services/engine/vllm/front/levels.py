"""What an engine behind vLLM holds now, for its metrics: as far as its page and its outputs tell."""

from __future__ import annotations

from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import engine as table
from microserve.services.engine.core.levels import read_shares
from microserve.services.engine.core.measure.tally import Tally
from microserve.services.engine.vllm.front.receives import Receives


def read_levels(
    readings: Readings, load: EngineLoad, num_blocks: int, receives: Receives, now: float
) -> None:
    num_kv = min(len(receives.waiting), load.num_waiting)
    readings.add_each(table.WAITING_FOR, {"capacity": load.num_waiting - num_kv, "kv": num_kv, "grammar": 0})
    grants = receives.grants.counts(now)
    taken = max(0, num_blocks - load.free_blocks)
    granted = min(taken, grants.num_live_blocks)
    quarantined = min(taken - granted, load.quarantined_blocks)
    readings.add_each(
        table.BLOCKS,
        {
            "free": load.free_blocks - load.cached_blocks,
            "cached": load.cached_blocks,
            "granted": granted,
            "quarantined": quarantined,
            "used": taken - granted - quarantined,
        },
    )
    states = {"open": grants.num_open, "sealed": grants.num_sealed, "quarantined": grants.num_quarantined}
    readings.add_each(table.GRANTS, states)
    readings.add(table.OLDEST_LEASE, grants.oldest_open_s)
    readings.add(table.OLDEST_QUARANTINE, grants.oldest_quarantine_s)
    read_shares(readings, load)


def read_prefixes(readings: Readings, tally: Tally) -> None:
    """vLLM says of each request what its cache had."""
    readings.add(table.PREFIX_QUERIES, tally.computed_tokens + tally.cached_tokens)
    readings.add(table.PREFIX_HITS, tally.cached_tokens)


def read_oldest(readings: Readings, came: list[float], now: float) -> None:
    """``came``: when those came that have no token yet."""
    readings.add(table.OLDEST_WAIT, now - min(came) if came else 0.0)
