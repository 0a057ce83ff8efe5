"""What ``microserve simulate`` asks of the process that simulates, as JSON in its only argument, and what it
makes of that: points, each one run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from microserve.protocol.messages.strategy.control import Scalar
from microserve.services.simulation.load.timing import Profile
from microserve.services.simulation.load.trace import TraceRequest
from microserve.services.simulation.load.trouble import NO_TROUBLE, Trouble


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
    seeds: int = 1
    """So many runs of each point, with the seeds from ``seed`` on."""
    kill: list[str] = []
    slow: list[str] = []
    """Both in the words of trouble.py."""
    lost: float = 0.0
    late: float = 0.0
    """Shares of all messages."""
    max_wall_s: float = 1800.0
    """Of one run, by the real clock; beyond that it is ended."""
    detail: bool = False
    """Print TTFT by prompt length and what each engine did."""
    rows: str = ""
    """File for one line a request: CSV by that suffix, else JSON lines."""
    slo_ttft_s: float = 5.0
    slo_tpot_s: float = 0.05
    out: str = ""
    """JSON-lines file, one line for each strategy and load."""
    plot: str = ""
    """Directory for SVG files."""


@dataclass(frozen=True)
class Point:
    """One strategy under one load: everything that decides what comes out."""

    strategy: str
    file: str
    """Where the strategy is from; empty: built in."""
    load: float
    """Requests a second."""
    requests: Sequence[TraceRequest]
    profile: Profile
    num_engines: int
    labels: tuple[tuple[str, ...], ...]
    scale: int
    seed: int
    parameters: dict[str, dict[str, Scalar]]
    """As the router takes them."""
    slo_ttft_s: float
    slo_tpot_s: float
    trouble: Trouble = NO_TROUBLE
    with_rows: bool = False
    max_wall_s: float = math.inf
    """By the real clock."""
