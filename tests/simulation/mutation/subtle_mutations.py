"""Bugs that plain storms miss: the situation in which each shows is rare.

Found since the dice are aimed at those situations (services/simulation/faults: ambush.py, strategies.py) and
writes are watched as they happen (services/simulation/engine/witness.py).
"""

from __future__ import annotations

from contextlib import ExitStack

from microserve.kvcache.grant.arrival import Arrival
from microserve.kvcache.grant.entry import Entry, State
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.kvcache.words import OPEN, count_of
from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages.engine import Sent
from microserve.protocol.messages.kv.grant import MAX_LANES
from microserve.services.engine.core.scheduler import Step
from microserve.services.engine.core.stepper import Stepper
from microserve.services.router.engines.load import Account
from microserve.services.router.serving.failover import Failover
from tests.simulation.mutation.planting import mutation, replace


@mutation
def _settled_under_its_writer(stack: ExitStack) -> None:
    """A sealed grant settles while a writer still holds its lane."""
    let_go_drained = GrantTable._let_go_drained

    def let_go_if_sealed(self: GrantTable, entry: Entry) -> bool:
        return entry.state is State.SEALED or let_go_drained(self, entry)

    replace(stack, GrantTable, "_let_go_drained", let_go_if_sealed)


@mutation
def _goes_on_behind_its_end(stack: ExitStack) -> None:
    """A continued request whose last delivered token was its end goes on."""
    replace(stack, Failover, "end_of", lambda self, delivered, served: None)


@mutation
def _any_open_grant_will_do(stack: ExitStack) -> None:
    """A late writer takes any open grant of the slot: the generation is not compared."""

    def require_open(self: LaneWriter) -> None:
        if self._peer.read(self._peer.words.state(self._grant.slot)) & 0xFF != OPEN:
            raise TransferFailed(f"grant {self._grant.grant_id} is closed")

    replace(stack, LaneWriter, "require_grant_open", require_open)


@mutation
def _furthest_end_is_the_frontier(stack: ExitStack) -> None:
    """The frontier of two lanes is the furthest end, whatever lies before."""

    def frontier(self: Arrival, layer: int) -> int:
        grant, words, ends = self._grant, self._heap.words, [self._grant.matched]
        for lane in range(MAX_LANES):
            count = count_of(self._heap.load(words.arrival(grant.slot, lane, layer)), grant.generation)
            if count and (interval := self._interval(lane)) is not None:
                ends.append(interval[0] + count)
        return max(ends)

    replace(stack, Arrival, "frontier", frontier)


@mutation
def _put_back_with_its_progress(stack: ExitStack) -> None:
    """An early start that gave way keeps its progress."""
    put_back = Stepper.put_back

    def put_back_and_keep(self: Stepper, step: Step) -> None:
        (chunk,) = step.batch.chunks
        put_back(self, step)
        if step.early is not None and step.early.blocks:
            step.early.num_computed = chunk.start + len(chunk.token_ids)

    replace(stack, Stepper, "put_back", put_back_and_keep)


@mutation
def _failed_send_stays_on_the_book(stack: ExitStack) -> None:
    """A failed send stays on its target's book."""
    end_transfer = Account.end_transfer

    def end_at_its_source(self: Account, name: str, sent: Sent | None = None) -> None:
        if sent is not None or name not in self.transfers:
            end_transfer(self, name, sent)
            return
        source, _, num_tokens = self.transfers.pop(name)
        self._book._add(self._book._transfers, source, -num_tokens)

    replace(stack, Account, "end_transfer", end_at_its_source)
