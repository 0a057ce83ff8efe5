"""What an engine holds now, for its metrics. Under the engine's lock; O(sequences + grants)."""

from __future__ import annotations

import time

from microserve.protocol.messages.engine import EngineLoad
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import engine as table
from microserve.services.engine.core.state import EngineState


def read_adapters(readings: Readings, num_adapters: int, running: set[str], waiting: set[str]) -> None:
    """Names of those with requests here; ``num_adapters``: as many as there may be."""
    names = [",".join(sorted(each - {""})) for each in (running, waiting)]
    readings.add(table.LORA, time.time(), str(num_adapters), *names)


def read_shares(readings: Readings, load: EngineLoad) -> None:
    """An engine of vLLM's says no ``prefill_share``: it is what is left."""
    shares = {"decode": load.decode_share, "transfer": load.transfer_share, "idle": load.idle_share}
    prefill = load.prefill_share or max(0.0, 1.0 - sum(shares.values()))
    readings.add_each(table.TIME_SHARE, {"prefill": prefill, **shares})


def read_levels(state: EngineState, readings: Readings, now: float) -> None:
    read_adapters(readings, 0, set(), set())
    memory, waiting = state.memory, state.scheduler.waiting
    waits = {"capacity": len(waiting), "kv": len(state.receiving), "grammar": len(state.compiling)}
    readings.add_each(table.WAITING_FOR, waits)
    came = [each.arrived_at for queue in (waiting, state.receiving, state.compiling) for each in queue]
    readings.add(table.OLDEST_WAIT, now - min(came) if came else 0.0)
    pool, grants = memory.pool, memory.grants.counts(now)
    taken = pool.num_blocks - pool.num_free
    readings.add_each(
        table.BLOCKS,
        {
            "free": pool.num_free - pool.num_cached,
            "cached": pool.num_cached,
            "granted": grants.num_live_blocks,
            "quarantined": pool.num_quarantined,
            "used": taken - pool.num_quarantined - grants.num_live_blocks,
        },
    )
    readings.add_each(
        table.GRANTS,
        {"open": grants.num_open, "sealed": grants.num_sealed, "quarantined": grants.num_quarantined},
    )
    readings.add(table.OLDEST_LEASE, grants.oldest_open_s)
    readings.add(table.OLDEST_QUARANTINE, grants.oldest_quarantine_s)
    readings.add(table.PREFIX_QUERIES, memory.cache.queries_tokens)
    readings.add(table.PREFIX_HITS, memory.cache.hit_tokens)
