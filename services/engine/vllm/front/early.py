"""Early starts: vLLM begins on the rest of a prompt while the last layers before it are on their way.

    granted ── enough layers are in ──> started ── Arrived ──> sealed, settled, taken: as any other
                                           │ NotArrived, a dead writer, a standstill
                                           v
                                        failed: its generation ends with transfer_failed

Worth it is what the receiver computes while it would have waited: its own share is to take as long as the
rest of the transfer. It starts no earlier than that, for whoever else is in vLLM's batch waits along. From
the start on its parked request ends by itself: vLLM would give its blocks away if it were aborted when it
is reported already (connector/receives.py).

Owns when one starts and when it is given up. Whether a layer is in and right, is the connector's to say.
"""

from __future__ import annotations

from microserve.protocol.errors import TransferFailed
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.stepper import PROBE_INTERVAL_S
from microserve.services.engine.vllm.front.receives import Receives
from microserve.services.engine.vllm.front.running import Pace, ParkedReceive, Running
from microserve.services.engine.vllm.front.state import VllmState
from microserve.services.engine.vllm.link import Arrived, NotArrived, Page

LEAD_S = 0.005
"""From the word to the first layer of the step: two looks and a pass of vLLM's scheduler."""
STANDSTILL_S = 2.0
"""A started one whose next layer does not come for so long is given up: vLLM's whole batch waits for it."""
ENDED_S = 1.0
"""Between the end of its parked request and the word that it has arrived."""


def is_due(pace: Pace, num_layers: int, share_s: float, now: float) -> bool:
    """Does the receiver's own share take as long as the layers that are missing, going by the others? Not
    known before two are in."""
    if pace.num_layers < 2:
        return False
    rest_s = (now - pace.first_at) / (pace.num_layers - 1) * (num_layers - pace.num_layers)
    return share_s + LEAD_S >= rest_s


class EarlyStarts:
    def __init__(
        self,
        state: VllmState,
        receives: Receives,
        page: Page,
        *,
        num_layers: int,
        block_size: int,
        max_num_seqs: int,
    ) -> None:
        self._state = state
        self._receives = receives
        self._page = page
        self._num_layers = num_layers
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs

    def start_if_due(self, received: ReceivedGrant, holder: Running, now: float) -> None:
        """Of one whose KV is not all in."""
        receive = self._receives.of(received)
        if receive is None or not self._may_start(receive, received, holder):
            return
        self._count(receive, received, now)
        rate = self._state.rates.prefill_tokens_per_s
        share = len(holder.token_ids) - received.grant.end
        if not rate or not is_due(receive.pace, self._num_layers, share / rate, now):
            return
        receive.is_started = holder.is_early = True
        receive.parked.cancel = lambda: None
        holder.ready_at = now
        self._state.counters["early_starts"] += 1
        self._page.start(receive.id, received.grant.slot, received.grant.generation)

    def watch(self, receive: ParkedReceive, received: ReceivedGrant, holder: Running, now: float) -> None:
        """Of a started one: can it still come?"""
        if receive.has_arrived:
            return
        self._count(receive, received, now)
        if now - received.probed_at >= PROBE_INTERVAL_S:
            received.probed_at = now
            reason = self._receives.grants.poisoned(received.grant_id)
            if reason is not None and not self._receives.grants.is_complete(received.grant_id):
                self._fail(holder, reason, now)
                return
        if receive.pace.num_layers < self._num_layers and now - receive.pace.moved_at >= STANDSTILL_S:
            self._fail(holder, f"no layer has come for {STANDSTILL_S:g} s", now)
        elif now - receive.parked_over_at >= ENDED_S:
            self._fail(holder, "vLLM has given up the blocks", now)

    def arrived(self, notice: Arrived) -> None:
        receive = self._receives.get(notice.id)
        if receive is not None and receive.received is not None and not receive.is_closed:
            receive.has_arrived = True
            self._receives.grants.seal(receive.received.grant_id)
            receive.received.num_pinned = 0

    def not_arrived(self, notice: NotArrived, now: float) -> None:
        receive = self._receives.get(notice.id)
        if receive is not None and receive.received is not None and not receive.is_closed:
            holder = receive.received.holder
            if isinstance(holder, Running):
                self._fail(holder, notice.detail, now)

    def _may_start(self, receive: ParkedReceive, received: ReceivedGrant, holder: Running) -> bool:
        end = received.grant.end
        num_generating = sum(not each.is_parked for each in self._state.live)
        return (
            not holder.await_first
            and holder.is_accepted
            and receive.parked.is_accepted
            and end % self._block_size == 0
            and end < len(holder.token_ids)
            and num_generating < self._max_num_seqs  # its parked request has a place, too
            and not self._receives.is_starting
        )

    def _count(self, receive: ParkedReceive, received: ReceivedGrant, now: float) -> None:
        pace, grants = receive.pace, self._receives.grants
        before = pace.num_layers
        while pace.num_layers < self._num_layers and grants.layer_complete(
            received.grant_id, pace.num_layers
        ):
            pace.num_layers += 1
        if pace.num_layers > before:
            pace.first_at = pace.first_at if before else now
            pace.moved_at = now

    def _fail(self, holder: Running, reason: str, now: float) -> None:
        self._state.counters["early_starts_failed"] += 1
        self._receives.fail(holder, TransferFailed(reason), now)
