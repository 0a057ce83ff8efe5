"""What every service has."""

from __future__ import annotations

from microserve.protocol.metrics.bounds import LAG_BOUNDS
from microserve.protocol.metrics.family import counter, histogram

LOOP_LAG = histogram(
    "microserve_loop_lag_seconds",
    "How late the event loop woke up, looked at every two seconds.",
    bounds=LAG_BOUNDS,
)
CPU = counter(
    "microserve_metrics_cpu_seconds",
    "CPU time of these metrics: copying numbers in the loop (`copy`), making text beside it (`text`).",
    "part",
    unit="seconds",
)
BUS_DROPPED = counter("microserve_bus_dropped", "Messages that a full queue of the bus refused.")
BUS_FAILED = counter("microserve_bus_failed", "Messages whose handler failed.")
LOG_DROPPED = counter("microserve_log_dropped", "Log lines that were not written, by why.", "reason")
LOG_LEFT_OUT = counter("microserve_log_left_out", "Log lines of floods that were counted instead.")

COMMON = (LOOP_LAG, CPU, BUS_DROPPED, BUS_FAILED, LOG_DROPPED, LOG_LEFT_OUT)
