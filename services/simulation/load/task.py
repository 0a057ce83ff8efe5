"""What ``microserve simulate`` asks of the process that simulates, as JSON in its only argument."""

from __future__ import annotations

import msgspec

from microserve.protocol.messages.control import Scalar


class SimulateTask(msgspec.Struct, frozen=True, kw_only=True):
    trace: str
    strategies: list[str]
    """Names of built-in strategies, or files (``*.py``); empty: all that are built in."""
    loads: list[float]
    """Requests a second."""
    num_engines: int = 4
    labels: list[str] = []
    """One for each engine; empty: none has any."""
    profile: str = "h200-8b"
    link_gbps: float = 0.0
    """0: the profile's."""
    num_requests: int = 400
    """From the beginning of the trace; 0: all."""
    longest: int = 0
    """Requests with more tokens, input and output, are left out; 0: none is."""
    scale: int = 8
    seed: int = 0
    jobs: int = 1
    parameters: dict[str, dict[str, Scalar]] = {}
    """Of strategies, by name, in real tokens."""
    slo_ttft_s: float = 5.0
    slo_tpot_s: float = 0.05
    out: str = ""
    """JSON-lines file, one line for each strategy and load."""
    plot: str = ""
    """Directory for SVG files."""
