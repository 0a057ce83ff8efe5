"""What every service has to tell of itself: its bus, its log, and (port.py) how late its loop is."""

from __future__ import annotations

from microserve.protocol.bus.transport import Bus, ZmqBus
from microserve.protocol.logging.setup import current
from microserve.protocol.metrics.readings import Readings
from microserve.protocol.metrics.table import common


def read_service(readings: Readings, bus: Bus) -> None:
    """A bus of a simulation counts nothing."""
    if isinstance(bus, ZmqBus):
        readings.add(common.BUS_DROPPED, bus.dropped)
        readings.add(common.BUS_FAILED, bus.failed)
    lines = current()
    dropped = {"none": 0} if lines is None else dict(lines.dropped) or {"none": 0}
    readings.add_each(common.LOG_DROPPED, dropped)
    readings.add(common.LOG_LEFT_OUT, 0 if lines is None else lines.left_out)
