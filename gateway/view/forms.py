"""The JSON of ``/view``: what the page, ``microserve top`` and scripts read. Fields are only ever added.

Times are seconds; ``at`` is wall clock (since 1970), ``age_s`` and the like are durations by one process's
monotonic clock. No field holds a word of a prompt or an answer.
"""

from __future__ import annotations

from typing import Any

import msgspec


class LoadForm(msgspec.Struct, frozen=True):
    """What an engine is doing now; as it says in its heartbeat."""

    running: int
    """Sequences in its batch."""
    waiting: int
    grants: int
    """Open ones: contexts that it receives."""
    queued_prefill_tokens: int
    used_blocks: int
    """By sequences and grants."""
    cached_blocks: int
    """Free, and full of what may be asked again."""
    free_blocks: int
    """Free, and empty."""
    quarantined_blocks: int
    """Of closed grants whose writer may still write."""
    prefill_tokens_per_s: float
    decode_step_s: float
    prefill_share: float
    """Of its time in the last seconds, steps with prefill in them; 0 to 1."""
    num_steps: int
    draining: bool
    granted_blocks: int = 0
    """Of the used ones, those of contexts that it receives."""
    oldest_lease_s: float = 0.0
    """Since the oldest open grant was given; 0: none is open."""
    decode_share: float = 0.0
    """As ``prefill_share``, of steps without prefill."""
    transfer_share: float = 0.0
    """As ``prefill_share``, of time without a step while KV was on its way."""
    idle_share: float = 0.0
    """As ``prefill_share``, of time with nothing to do. All four 0: it does not say."""


class EngineForm(msgspec.Struct, frozen=True):
    """One engine, member or not."""

    id: str
    state: str
    """``ready``, ``draining``, ``refused`` (asks to be a member and may not be) or ``lost``."""
    detail: str
    """Why it is refused or lost."""
    address: str
    host: str
    """Of its address."""
    model: str
    backend: str
    backend_version: str
    numerics: str
    """Its class; empty: it says none."""
    exact: bool
    labels: list[str]
    """As they are in force: an operator's go before its own."""
    heaps: list[str]
    block_size: int
    num_blocks: int
    can: list[str]
    """What it does beside whole requests."""
    load: LoadForm | None
    """None: it is no member."""
    cluster: str = ""


class PairForm(msgspec.Struct, frozen=True):
    """KV from one engine to another."""

    source: str
    target: str
    heap: str
    """Through which it would go; empty: through none."""
    bytes_per_s: float = 0.0
    """Of the network between, as the sender measured it last; 0: there is none, or nothing is known."""


class SampleForm(msgspec.Struct, frozen=True):
    """The last quarter of an hour of one engine, a value every ``interval_s``, the newest last."""

    engine: str
    running: list[int]
    waiting: list[int]
    kv_usage: list[float]
    """Blocks that sequences and grants use, 0 to 1."""
    steps_per_s: list[float]
    prefill_share: list[float]


class MeshForm(msgspec.Struct, frozen=True):
    """``/view/mesh``."""

    at: float
    index_alive: bool
    """What follows is as of now; else as of when the index was last heard, or empty."""
    index_age_s: float
    routers: list[dict[str, Any]]
    """As ``/ready`` has them."""
    engines: list[EngineForm]
    pairs: list[PairForm]
    interval_s: float
    history: list[SampleForm]


class PhaseForm(msgspec.Struct, frozen=True):
    name: str
    begin_s: float
    """After the request's arrival."""
    seconds: float
    where: str
    """``gateway``, ``router``, or an engine's id."""


class RequestForm(msgspec.Struct, frozen=True):
    """One choice of one request: the canonical line, and when it ended. ``at`` 0: it still runs."""

    id: str
    http_id: str
    at: float
    age_s: float
    """Since its end; of one that runs since its arrival."""
    path: str
    stream: bool
    status: int
    code: str
    finish_reason: str
    model: str
    key: str
    strategy: str
    strategy_version: int
    share: str
    engines: list[str]
    heaps: list[str]
    why: str
    alone: str
    moves: int
    numerics: str
    exact: bool
    prompt_tokens: int
    cached_tokens: int
    received_tokens: int
    output_tokens: int
    ttft_s: float | None
    wall_s: float
    phases_s: dict[str, float]
    """By phase, in order; they add up to ``wall_s``."""


class RequestsForm(msgspec.Struct, frozen=True):
    """``/view/requests``: those that run, then those that have ended, by the order that was asked for."""

    at: float
    running: list[RequestForm]
    ended: list[RequestForm]
    num_kept: int
    """Of the last quarter of an hour, of all workers of this gateway; ``ended`` may have fewer."""


class RequestDetail(msgspec.Struct, frozen=True):
    """``/view/requests/{id}``: one request taken apart."""

    request: RequestForm | None
    """None: this gateway does not remember it."""
    timeline: list[PhaseForm]
    """One after the other, from its arrival to its last byte: they add up to ``wall_s``."""
    records: list[dict[str, Any]]
    """What routers remember of it (WIRE.md 6.6, ``Explanation``), the newest first."""
    silent: list[str]
    """Routers that did not answer."""


class StrategiesForm(msgspec.Struct, frozen=True):
    """``/view/strategies``: as ``microserve strategy list``, ``history`` and ``compare`` have it."""

    at: float
    version: int
    """Of the control state."""
    durable: bool
    entries: list[dict[str, Any]]
    """WIRE.md 6.4, ``ControlEntry``; sources are left out."""
    routers: list[dict[str, Any]]
    ramps: list[dict[str, Any]]
    history: list[dict[str, Any]]
    """The newest first: marks on every chart."""
    scores: list[dict[str, Any]]


class KeyForm(msgspec.Struct, frozen=True):
    """One API key by its name; its use since the process began, and today's of all gateways."""

    name: str
    requests: int
    refused: int
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    streams: int
    tokens_today: int
    tokens_per_day: int
    """Its budget; 0: it has none."""
    max_streams: int
    operator: bool


class KeysForm(msgspec.Struct, frozen=True):
    """``/view/keys``."""

    at: float
    keys: list[KeyForm]


class AlarmForm(msgspec.Struct, frozen=True):
    """Something that is wrong now."""

    name: str
    """Stable: ``engine.lost``, ``engine.refused``, ``index.silent``, ``router.silent``, ``check.differs``."""
    subject: str
    """Whose."""
    text: str


class CheckForm(msgspec.Struct, frozen=True):
    """The last self-check of one pair of engines."""

    source: str
    target: str
    """Empty: the source alone."""
    outcome: str
    """``equal``, ``differs`` or ``unfinished``, which says nothing."""
    differs: str
    """Which answer is not as the cold one: ``cached`` or ``transferred``."""
    compared: str
    """``bits``, or ``tokens`` where the class promises no bits."""
    code: str
    """Why it is unfinished."""
    at: float
    """When it was over."""
    took_s: float
    tokens: int
    """Computed for it."""
    router: str


class HealthForm(msgspec.Struct, frozen=True):
    """``/view/health``."""

    at: float
    version: str
    ready: bool
    draining: bool
    alarms: list[AlarmForm]
    """Empty: nothing is known to be wrong."""
    checks: list[CheckForm]
    """What the routers' self-checks have found, by pair of engines: those that differ, then the newest."""
    limits: dict[str, int]
    """Of this gateway: streams and their bound, and so on."""
