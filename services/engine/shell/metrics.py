"""An engine's metrics, as they are now: what its core holds and has done, and what its shell has sent.

Called in the loop, by the metrics port, at most once a second. Knows no backend: each core says what it has
(door.py).
"""

from __future__ import annotations

from microserve.protocol.bus.transport import Bus
from microserve.protocol.messages.engine import EngineInfo
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.service import read_service
from microserve.protocol.metrics.table import engine as table
from microserve.protocol.process.version import own_version
from microserve.services.engine.shell.action_server import ActionServer
from microserve.services.engine.shell.door import Core
from microserve.services.engine.shell.kv_publisher import PublisherCounters


def engine_readings(
    core: Core, info: EngineInfo, server: ActionServer, published: PublisherCounters, bus: Bus
) -> Readings:
    readings = Readings({"model_name": info.model, "engine": info.engine_id})
    with core.lock:
        load = core.load()
        core.read(readings)
    num_blocks = info.num_blocks
    readings.add(table.RUNNING, load.num_running)
    readings.add(table.WAITING, load.num_waiting)
    readings.add(table.QUEUED_TOKENS, load.queued_prefill_tokens)
    usable = core.state.limits.num_blocks  # vLLM keeps a block of its pool for itself
    readings.add(table.USAGE, 1.0 - load.free_blocks / usable if usable else 0.0)
    readings.add(table.DRAINING, load.draining)
    readings.add(table.ROUTERS, server.num_sessions)
    readings.add(table.PREFILL_RATE, load.prefill_tokens_per_s)
    readings.add(table.DECODE_STEP, load.decode_step_s)
    readings.add(table.CACHE_CONFIG, 1, str(info.block_size), str(num_blocks), "True")
    numerics = info.numerics
    backend = (info.backend, info.backend_version, numerics.name, str(numerics.is_exact).lower())
    readings.add(table.INFO, 1, own_version(), *backend, " ".join(info.all_heaps))
    readings.add_each(
        table.EVENTS,
        {"published": published.batches, "repeated": published.repeated, "unsent": published.unsent},
    )
    ended = {"done": published.replays - published.replays_given_up, "given_up": published.replays_given_up}
    readings.add_each(table.REPLAYS, ended)
    readings.add(table.REJECTED, server.rejected)
    read_service(readings, bus)
    return readings
