"""Receives and their grants: from a parked request's blocks to KV in vLLM's prefix cache.

    ask ── Allocated ──> granted ── all in, verified, no writer left ──> taken ── Received ──> pinned
     │ too late             │ closed, expired                                                    │ used
     v                      v                                                                    v
    given up             given up when no writer is left (quarantine) ───────────────────────> Freed

vLLM shares a block as soon as it is cached, so a receive is taken when its grant has *settled*: nobody can
write there any more. Until ``Freed`` its place on the page is ours. Sans-I/O but for the page's words.
"""

from __future__ import annotations

from collections.abc import Callable

import structlog

from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.heap.heap import Heap
from microserve.kvcache.layout import KvLayout
from microserve.protocol import log
from microserve.protocol.errors import (
    CacheFull,
    GrantsFull,
    InternalError,
    MeshError,
    PromptTooLong,
    TransferFailed,
)
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.adapter import Adapter, adapter_named
from microserve.services.engine.core import trace
from microserve.services.engine.core.request.received import ReceivedGrant, ReceivedGrants
from microserve.services.engine.core.request.record import CommitJob, RecordOf
from microserve.services.engine.core.state import failed
from microserve.services.engine.vllm.front.pool import PINNED, ReceivePool
from microserve.services.engine.vllm.front.running import ParkedReceive, Running, RunningRecord
from microserve.services.engine.vllm.front.sampling import probe_of
from microserve.services.engine.vllm.front.state import VllmState
from microserve.services.engine.vllm.link import Allocated, Freed, Page, Receive, Received

ALLOCATE_S = 8.0
"""A parked request that has no blocks by then is given up: its caller tries elsewhere."""
RETRY_AFTER_S = 0.1
ANNOUNCED_S = 1.0
"""Longest wait for vLLM's events to tell of what is cached."""

_logger = structlog.get_logger()


class Receives:
    """All receives of one front, by their ids; and the grants that are open, with their holders."""

    def __init__(
        self,
        state: VllmState,
        page: Page,
        heap: Heap,
        *,
        engine_id: str,
        incarnation: int,
        lease_s: float,
        checksums: bool,
    ) -> None:
        """``heap``: a view of the worker's."""
        self.pool = ReceivePool(self._give_back)
        self.grants = GrantTable(
            heap,
            self.pool,
            engine_id=engine_id,
            incarnation=incarnation,
            lease_s=lease_s,
            verify_checksums=checksums,
            numerics=state.numerics.name,
        )
        self.book = ReceivedGrants()
        self.waiting: list[Running] = []
        """Accepted generations whose KV is not settled."""
        self.committing: list[RunningRecord] = []
        self.on_first: Callable[[Running, int, float], None] = lambda running, token, now: None
        """Called when the sender's first token, and all KV, are in."""
        self.is_told: Callable[[list[int], str, str], bool] = lambda tokens, salt, adapter: True
        """Do our events tell of these tokens' last block? In whole blocks, under that salt and adapter."""
        self.announcing: dict[int, float] = {}
        """Committed receives that are cached and not told of, by id: until when they are waited for."""
        self._layout: KvLayout = heap.layout
        self._state = state
        self._page = page
        self._receives: dict[int, ParkedReceive] = {}
        state.on_over = self._over
        state.close_received = self.close_received
        state.has_receives = lambda: self.has_any

    @property
    def has_any(self) -> bool:
        return bool(self._receives) or self.grants.has_any

    @property
    def num_waiting(self) -> int:
        return self.book.num_waiting + sum(each.received is None for each in self._receives.values())

    # --- asked ---------------------------------------------------------------------------------------

    def ask(
        self, record: RunningRecord, call_id: int, end: int, salt: str, now: float, traceparent: str = ""
    ) -> None:
        """Park a request for blocks of ``[0, end)``; the answer follows. The rule of ``KvMemory.open_grant``:
        what waits for KV pins half of the pool at most."""
        pinned, room = self._layout.num_blocks_for(end), self._layout.num_blocks // 2
        if pinned + 1 > room:
            raise PromptTooLong(
                f"receiving {end} tokens takes {pinned + 1} blocks, at most {room} may wait for KV",
                field="end",
            )
        asked = sum(each.num_pinned for each in self._receives.values() if each.received is None)
        pending = self.book.num_pinned + asked
        if pending + pinned > room:
            raise GrantsFull(
                f"{pending} blocks wait for KV already, {pinned} more asked", retry_after_s=RETRY_AFTER_S
            )
        receive_id = self._page.begin()
        if receive_id is None:
            raise GrantsFull("every place for a receive is in use", retry_after_s=RETRY_AFTER_S)
        parked = record.asked = Running(
            owner=record.owner,
            request_id=record.request_id,
            call_ids=[call_id],
            token_ids=record.token_ids[:end],
            num_prompt_tokens=end,
            params=None,
            sampling=probe_of(),
            salt=salt,
            arrived_at=now,
            deadline=float("inf"),
            ask=Receive(receive_id, end),
            receive_id=receive_id,
            adapter=record.adapter,
            traceparent=traceparent,
        )
        self._receives[receive_id] = ParkedReceive(
            receive_id, record, parked, salt, end, pinned, now + ALLOCATE_S
        )
        self._state.begin(parked)

    def open_empty(self, record: RunningRecord, salt: str, now: float) -> ReceivedGrant:
        """A grant of nothing: the receiver computes all."""
        grant = self.grants.open(
            record.request_id, record.owner.hex(), [], 0, [], 0, now, adapter=self._adapter(record.adapter)
        )
        received = ReceivedGrant(grant, [], salt, record, 0)
        self.book.add(received)
        return received

    def _adapter(self, name: str) -> Adapter | None:
        return adapter_named(name, self._state.limits.adapters)

    # --- what the connector tells --------------------------------------------------------------------

    def allocated(self, notice: Allocated, now: float) -> None:
        receive = self._receives.get(notice.id)
        if receive is None or receive.is_dropped or receive.received is not None:
            return
        record, parked = receive.record, receive.parked
        matched = [PINNED] * (notice.matched // self._layout.block_size)
        self.pool.own(notice.blocks, receive.id)
        try:
            grant = self.grants.open(
                parked.request_id,
                parked.owner.hex(),
                matched,
                notice.matched,
                notice.blocks,
                receive.end,
                now,
                adapter=self._adapter(parked.adapter),
            )
        except CacheFull as error:
            self.pool.disown(notice.blocks)
            self._state.counters["grants_refused"] += 1
            self._state.fail(parked, error, now)
            return
        record.asked = None
        receive.received = ReceivedGrant(
            grant, parked.token_ids, receive.salt, record, receive.num_pinned, opened_at=now
        )
        self.book.add(receive.received)
        self._state.counters["grants_opened"] += 1
        self._state.answer(parked, wire.Granted(0, grant))
        trace.granted(parked.traceparent, parked.request_id, now - parked.arrived_at, grant)

    def cached(self, notice: Received, now: float) -> None:
        """Its blocks are in vLLM's prefix cache."""
        receive = self._receives.get(notice.id)
        if receive is None:
            return
        receive.is_cached = True
        if receive.commit is not None:
            self.announcing[receive.id] = now + ANNOUNCED_S
            self.announce(now)
        elif receive.is_unwanted:
            self._drop(receive)

    def announce(self, now: float) -> None:
        """Answer commits whose blocks our events tell of: vLLM's come by a way of their own."""
        for receive_id, until in list(self.announcing.items()):
            receive = self._receives[receive_id]
            block_size = self._layout.block_size
            num_tokens = receive.end // block_size * block_size
            parked = receive.parked
            if now < until and not self.is_told(parked.token_ids[:num_tokens], receive.salt, parked.adapter):
                continue
            del self.announcing[receive_id]
            if receive.commit is not None:
                job, receive.commit = receive.commit, None
                self._committed(receive.record, job, num_tokens)
            self._drop(receive)

    def freed(self, notice: Freed, now: float) -> None:
        receive = self._receives.pop(notice.id, None)
        if receive is None:
            return
        self.announcing.pop(receive.id, None)
        self._page.retire(receive.id)
        error = TransferFailed("vLLM has given up the blocks")
        if receive.commit is not None:
            self._fail_commit(receive.record, receive.commit, error)
        self._state.fail(receive.parked, error, now)  # it is over, as a rule

    # --- built on ------------------------------------------------------------------------------------

    def adopt(self, running: Running, received: ReceivedGrant, numerics: str) -> None:
        """A generation builds on the grant, whose KV comes in the class of that name."""
        grant = received.grant
        self._take(received, numerics)
        receive = self.of(received)
        running.receive_id = None if receive is None else receive.id
        running.cached_tokens, running.received_tokens = grant.matched, grant.end - grant.matched
        running.is_foreign = received.is_foreign
        received.hand_to(running)
        self.waiting.append(running)

    def commit(self, record: RunningRecord, received: ReceivedGrant, job: CommitJob, numerics: str) -> None:
        record.commit = job
        self._take(received, numerics)
        self.committing.append(record)

    def _take(self, received: ReceivedGrant, numerics: str) -> None:
        grant = received.grant
        received.is_foreign = grant.matched < grant.end and numerics != self._state.numerics.name
        self.grants.consume(grant.grant_id)

    def settled(self, received: ReceivedGrant, now: float) -> None:
        """The last writer has let go: vLLM may have the blocks, and share them."""
        holder, receive = received.holder, self.of(received)
        self.book.forget(received)
        grant, layout = received.grant, self._layout
        nbytes = len(grant.blocks) * layout.block_nbytes * layout.num_layers
        self._state.tally.received(grant.heap.kind, now - received.opened_at, nbytes)
        if receive is not None:
            self.pool.disown(received.grant.blocks)
            receive.is_taken = True
            self._page.take(receive.id)
        if isinstance(holder, Running):
            if holder in self.waiting:
                self.waiting.remove(holder)
            if receive is None or not receive.is_started:
                holder.ready_at = now
            self._state.counters["received_tokens"] += holder.received_tokens
            _logger.debug(log.KV_RECEIVED, request_id=holder.request_id, num_tokens=holder.received_tokens)
            if holder.first_token is not None:
                self.on_first(holder, holder.first_token, now)
        elif isinstance(holder, RecordOf) and holder.commit is not None:
            job, holder.commit = holder.commit, None
            self.committing.remove(holder)
            if receive is None:  # of an empty grant
                self._committed(holder, job, 0)
            else:
                receive.commit = job
        else:
            raise InternalError(f"grant {received.grant_id} has settled, and nobody had sealed it")

    def expired(self, received: ReceivedGrant, now: float) -> None:
        """The table has closed it, for nobody has built on it in time."""
        receive = self.of(received)
        self.book.forget(received)
        self._abandon(receive, now)

    def give_up_late(self, now: float) -> None:
        """Requests that vLLM has had no blocks for until now."""
        for receive in list(self._receives.values()):
            if receive.received is None and not receive.is_dropped and now >= receive.allocate_by:
                self._state.counters["grants_refused"] += 1
                late = GrantsFull(f"vLLM had no blocks within {ALLOCATE_S:g} s", retry_after_s=RETRY_AFTER_S)
                self._state.fail(receive.parked, late, now)

    def _committed(self, record: RunningRecord, job: CommitJob, num_tokens: int) -> None:
        self._state.counters["commits"] += 1
        _logger.info(log.KV_COMMITTED, request_id=record.request_id, num_tokens=num_tokens)
        self._state.outbox.replies.append((record.owner, wire.Committed(job.call_id, num_tokens)))

    # --- endings -------------------------------------------------------------------------------------

    def close_received(self, record: RunningRecord, now: float) -> None:
        """Give up what the record has asked for or holds, and whatever waits for it."""
        error = TransferFailed("the grant was closed")
        if record.asked is not None:
            self._state.fail(record.asked, error, now)
        if record.received is not None:
            self._close(record.received, now)
        if record.commit is not None:
            self._fail_commit(record, record.commit, error)

    def fail(self, holder: Running | RunningRecord, error: MeshError, now: float) -> None:
        """What it waits for cannot come."""
        if isinstance(holder, Running):
            self._state.fail(holder, error, now)
            return
        if holder.commit is not None:
            self._fail_commit(holder, holder.commit, error)
        self.close_received(holder, now)

    def _fail_commit(self, record: RunningRecord, job: CommitJob, error: MeshError) -> None:
        record.commit = None
        if record in self.committing:
            self.committing.remove(record)
        self._state.outbox.replies.append((record.owner, failed(job.call_id, error)))

    def _close(self, received: ReceivedGrant, now: float) -> None:
        """Nobody wants it any more: given up now, or when no writer is left."""
        receive = self.of(received)
        self.book.forget(received)
        self.grants.close(received.grant_id, now)
        self._abandon(receive, now)

    def _abandon(self, receive: ParkedReceive | None, now: float) -> None:
        """Its grant is closed: vLLM need not wait for it, and keeps the blocks until it is dropped."""
        if receive is not None and not receive.is_closed:
            receive.is_closed = True
            self._state.over(receive.parked, now)

    def _over(self, running: Running, now: float) -> None:
        """Of any request."""
        if running in self.waiting:
            self.waiting.remove(running)
        receive = None if running.receive_id is None else self._receives.get(running.receive_id)
        if running.received is not None:
            if receive is not None and receive.is_started and running.first_token_at is not None:
                receive.is_unwanted = True  # all of it is in; there may be a writer yet
            else:
                self._close(running.received, now)
        elif receive is None or receive.is_closed:
            pass
        elif not running.is_parked or receive.received is None:
            self._drop(receive)
        elif receive.is_started:
            receive.parked_over_at = now
        elif not receive.is_taken:
            receive.is_closed = True
            holder = receive.received.holder
            if isinstance(holder, Running | RecordOf):
                self.fail(holder, TransferFailed("vLLM has given up the blocks"), now)

    def _give_back(self, receive_id: int) -> None:
        receive = self._receives.get(receive_id)
        if receive is not None:
            self._drop(receive)

    def _drop(self, receive: ParkedReceive) -> None:
        """No write into its blocks can come, and nobody needs them any more.

        One that is taken is cached first: a word that is another one before the worker has looked would leave
        its request parked for ever."""
        if receive.is_taken and not receive.is_cached:
            receive.is_unwanted = True
        elif not receive.is_dropped:
            receive.is_dropped = True
            self._page.drop(receive.id)

    def get(self, receive_id: int) -> ParkedReceive | None:
        return self._receives.get(receive_id)

    @property
    def is_starting(self) -> bool:
        """One was started early, and it is not known yet that all of it is in."""
        return any(each.is_started and not each.has_arrived for each in self._receives.values())

    def of(self, received: ReceivedGrant) -> ParkedReceive | None:
        """None of an empty grant."""
        return next((each for each in self._receives.values() if each.received is received), None)

    def check_integrity(self) -> None:
        """Raises :class:`InternalError`."""
        self.grants.check_integrity()
        self.book.check_integrity(self.grants.live_ids)
