"""What time and the writers bring to receives: KV that is whole, writers that are gone, leases that are over.

Looked at often while somebody waits (``is_watching``): words of a heap wake nobody. Owns when a grant is
sealed; what follows from that is receives.py's.
"""

from __future__ import annotations

import structlog

from microserve.kvcache.grant.table import Discharged, Expired, Settled
from microserve.protocol import log
from microserve.protocol.errors import DeadlineExceeded, TransferFailed
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.stepper import PROBE_INTERVAL_S
from microserve.services.engine.vllm.front.early import EarlyStarts
from microserve.services.engine.vllm.front.receives import Receives
from microserve.services.engine.vllm.front.running import Running, RunningRecord
from microserve.services.engine.vllm.front.state import VllmState

_logger = structlog.get_logger()


class Arrivals:
    def __init__(
        self, state: VllmState, receives: Receives, num_layers: int, early: EarlyStarts | None = None
    ) -> None:
        """``early``: None starts nothing early."""
        self._state = state
        self._early = early
        self._receives = receives
        self._num_layers = num_layers

    @property
    def is_watching(self) -> bool:
        """Somebody waits for KV, or for the last writer's end."""
        receives = self._receives
        return bool(receives.waiting or receives.committing or receives.announcing)

    def poll(self, now: float) -> None:
        receives = self._receives
        holders: list[Running | RunningRecord] = [*receives.waiting, *receives.committing]
        for holder in holders:
            if holder.received is not None:
                self._look(holder.received, now, holder)
        for event in receives.grants.poll(now):
            match event:
                case Expired():
                    _logger.warning(log.GRANT_EXPIRED, grant_id=event.grant_id, request_id=event.request_id)
                    self._state.counters["grants_expired"] += 1
                    receives.expired(receives.book.get(event.grant_id), now)
                case Discharged():
                    _logger.info(
                        log.GRANT_DISCHARGED,
                        grant_id=event.grant_id,
                        request_id=event.request_id,
                        blocks=event.num_blocks,
                    )
                case Settled():
                    receives.settled(receives.book.get(event.grant_id), now)
        receives.announce(now)
        receives.give_up_late(now)
        for record in list(receives.committing):
            if record.commit is not None and record.commit.deadline <= now:
                receives.fail(record, DeadlineExceeded("the KV to commit did not arrive in time"), now)

    def _look(self, received: ReceivedGrant, now: float, holder: Running | RunningRecord) -> None:
        """Has all of it come?"""
        grants, grant_id = self._receives.grants, received.grant_id
        awaits = isinstance(holder, Running) and holder.await_first
        if received.num_pinned == 0 and received.grant.blocks:
            return  # sealed
        receive = self._receives.of(received)
        if receive is not None and receive.is_started:
            if self._early is not None and isinstance(holder, Running):
                self._early.watch(receive, received, holder, now)
            return
        if not grants.is_complete(grant_id) or (awaits and grants.first_token(grant_id) is None):
            if self._early is not None and isinstance(holder, Running):
                self._early.start_if_due(received, holder, now)
            if now - received.probed_at < PROBE_INTERVAL_S:
                return
            received.probed_at = now
            reason = grants.poisoned(grant_id, await_first=awaits)
            # A writer may have finished between our two looks.
            whole = grants.is_complete(grant_id) and not (awaits and grants.first_token(grant_id) is None)
            if reason is not None and not whole:
                self._receives.fail(holder, TransferFailed(reason), now)
            return
        try:
            for layer in range(self._num_layers):
                grants.verify(grant_id, layer)
        except TransferFailed as error:
            self._receives.fail(holder, error, now)
            return
        if isinstance(holder, Running) and awaits:
            holder.first_token = grants.first_token(grant_id)
        grants.seal(grant_id)
        received.num_pinned = 0
