"""What an engine is doing now, as its heartbeats say it (WIRE.md 4.3): the part that changes, beside
engine_info.py.

Plain data. Knows no conversation that carries it.
"""

from __future__ import annotations

import msgspec

MAX_LINKS_TOLD = 8
"""In one ``EngineLoad``."""


class LinkGoodput(msgspec.Struct, frozen=True, array_like=True):
    """Of the network from an engine to another one, while it was all that KV waited for."""

    engine_id: str
    """The other one."""
    bytes_per_s: float


class EngineLoad(msgspec.Struct, frozen=True, array_like=True):
    """What an engine is doing now; travels in heartbeats and stats."""

    progress: int = 0
    """Grows with every layer computed: a busy engine whose progress stands still is hung."""
    num_steps: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_grants: int = 0
    queued_prefill_tokens: int = 0
    free_blocks: int = 0
    cached_blocks: int = 0
    """Of the free ones, those that hold reusable prefixes."""
    quarantined_blocks: int = 0
    prefill_tokens_per_s: float = 0.0
    decode_step_s: float = 0.0
    draining: bool = False
    max_num_seqs: int = 0
    """Places in the running batch; 0: not said."""
    prefill_rate_age_s: float = 0.0
    """Since ``prefill_tokens_per_s`` was last measured."""
    mean_output_tokens: float = 0.0
    """Of sequences that have ended there; 0 before the first."""
    prefill_share: float = 0.0
    """Of its time in the last seconds, what steps with prefill in them took."""
    max_num_batched_tokens: int = 0
    """Tokens in one step, prefill and decode together; 0: not said."""
    granted_blocks: int = 0
    """Of those in use, those that others write KV into, or that received KV is read from."""
    oldest_lease_s: float = 0.0
    """Since the oldest open grant was given; 0: none is open."""
    decode_share: float = 0.0
    """Of its time in the last seconds, what steps without prefill in them took."""
    transfer_share: float = 0.0
    """Of its time in the last seconds, what passed without a step while KV was on its way."""
    idle_share: float = 0.0
    """Of its time in the last seconds, what passed with nothing to do. 0 beside a ``decode_share`` and a
    ``transfer_share`` of 0: it does not say."""
    links: list[LinkGoodput] = []
    """To the engines that it sent to last, at most ``MAX_LINKS_TOLD``."""

    def goodput_to(self, engine_id: str) -> float:
        """Bytes a second; 0: it does not say."""
        return next((link.bytes_per_s for link in self.links if link.engine_id == engine_id), 0.0)

    @property
    def is_busy(self) -> bool:
        """It has work that must make progress. Waiting requests do not count: they may rightly wait for
        blocks or for another engine's KV."""
        return self.num_running > 0
