"""Bugs planted on purpose: each must be caught by the simulation, or the simulation proves nothing.

    python tests/simulation/mutation/mutations.py    bug, seeds and seconds until it was caught, what was seen

Every mutation is one small lie told to one function, undone afterwards. Several are bugs that systems of this
kind have shipped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import tests.simulation.mutation.gateway_mutations
import tests.simulation.mutation.guided_mutations
import tests.simulation.mutation.numerics_mutations
import tests.simulation.mutation.scored_mutations
import tests.simulation.mutation.subtle_mutations  # noqa: F401  (as well)
from microserve.kvcache.grant.arrival import Arrival
from microserve.kvcache.grant.table import Discharged, GrantEvent, GrantTable
from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.bus.credit import CreditMeter
from microserve.protocol.bus.numbered import Incoming, Verdict
from microserve.protocol.bus.peers import Loss, Peer, Peers
from microserve.protocol.bus.queue import StreamQueue
from microserve.protocol.errors import MeshError, StrategyError
from microserve.protocol.messages.engine import SnapshotReply
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.request.sequence import Sequence
from microserve.services.engine.core.scheduler import Scheduler, Step
from microserve.services.engine.shell.action_server import ActionServer, Session
from microserve.services.links.feed_state import FeedState
from microserve.services.router.engines.load import Account
from microserve.services.router.request.request import Request
from microserve.services.router.request.scope import RequestScope
from microserve.services.router.serving.failover import Failover
from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.guided import guided
from microserve.services.simulation.faults.scenario import draw
from microserve.services.simulation.faults.scored import scored
from tests.simulation.mutation.guided_mutations import GUIDED
from tests.simulation.mutation.planting import MUTATIONS, mutation, replace
from tests.simulation.mutation.scored_mutations import SCORED

LIMIT_SEEDS = 2000

# --- KV ----------------------------------------------------------------------------------------------


@mutation
def _skip_quarantine(stack: ExitStack) -> None:
    """Skip quarantine: a closed grant's blocks are free at once."""
    replace(stack, GrantTable, "_let_go_drained", lambda self, entry: True)


@mutation
def _free_by_timer(stack: ExitStack) -> None:
    """Free by timer: quarantine ends when its lease is over."""
    poll = GrantTable.poll

    def poll_with_timer(self: GrantTable, now: float) -> list[GrantEvent]:
        events = poll(self, now)
        for entry in list(self._entries.values()):
            if entry.state.value == "quarantined" and now - entry.since > self._lease_s:
                self._forget(entry)
                self._pool.discharge(entry.grant.blocks)
                events.append(Discharged(entry.grant.grant_id, entry.request_id, len(entry.grant.blocks)))
        return events

    replace(stack, GrantTable, "poll", poll_with_timer)


@mutation
def _publish_before_arrival(stack: ExitStack) -> None:
    """Publish before arrival: a prefix is cached while its KV is still to come."""
    adopt = KvMemory.adopt

    def adopt_and_publish(self: KvMemory, sequence: Sequence, received: ReceivedGrant) -> None:
        adopt(self, sequence, received)
        grant = received.grant
        num_full, start = grant.end // grant.block_size, grant.matched // grant.block_size
        self.cache.insert(received.token_ids, sequence.blocks, num_full, received.salt, start=start)

    replace(stack, KvMemory, "adopt", adopt_and_publish)


@mutation
def _any_arrival_is_all(stack: ExitStack) -> None:
    """A layer counts as here when its first chunk is."""

    def layer_complete(self: Arrival, layer: int) -> bool:
        return self._grant.matched == self._grant.end or self.frontier(layer) > self._grant.matched

    replace(stack, Arrival, "layer_complete", layer_complete)


@mutation
def _one_row_early(stack: ExitStack) -> None:
    """Off by one: a layer counts as here one row before it is."""

    def layer_complete(self: Arrival, layer: int) -> bool:
        return self.frontier(layer) >= self._grant.end - 1

    replace(stack, Arrival, "layer_complete", layer_complete)


@mutation
def _verify_nothing(stack: ExitStack) -> None:
    """Received blocks are used without a look at their tags and checksums."""
    replace(stack, Arrival, "verify", lambda self, layer: None)


@mutation
def _poison_is_ignored(stack: ExitStack) -> None:
    """A writer's failure or death is not noticed by who waits for it."""
    replace(stack, Arrival, "poisoned", lambda self, *, await_first=False: None)


@mutation
def _lane_is_kept(stack: ExitStack) -> None:
    """A writer never lets its lane go."""

    def finish(self: LaneWriter) -> None:
        self._is_over = True

    replace(stack, LaneWriter, "finish", finish)


@mutation
def _preempted_keeps_its_blocks(stack: ExitStack) -> None:
    """A preempted sequence goes on with the blocks that it gave back."""
    preempt = Scheduler.preempt

    def preempt_and_keep(self: Scheduler, sequence: Sequence, step: Step) -> None:
        blocks, num_computed = sequence.blocks, sequence.num_computed
        preempt(self, sequence, step)
        if sequence.num_output_tokens:
            sequence.blocks, sequence.num_computed = blocks, num_computed

    replace(stack, Scheduler, "preempt", preempt_and_keep)


# --- requests ----------------------------------------------------------------------------------------


@mutation
def _forget_abort_on_one_leg(stack: ExitStack) -> None:
    """Forget Abort on one leg: the first engine of a request is not told that it has ended."""

    def close(self: RequestScope) -> None:
        if self.is_closed:
            return
        self.is_closed = True
        for number, (connection, holds) in enumerate(self._holds.items()):
            if holds and number > 0:
                connection.abort(self.request.request_id)
            connection.prompts.discard(self.request.request_id)
        self._holds.clear()
        ended: MeshError = StrategyError("ended")
        for callback in self._on_close:
            callback(ended)
        self._on_close.clear()
        self.account.close()

    replace(stack, RequestScope, "close", close)


@mutation
def _lose_the_offset(stack: ExitStack) -> None:
    """Lose the retry's offset: a continued request starts again from its prompt."""
    replace(stack, Failover, "continued", lambda self, delivered: self.original)


@mutation
def _repeat_a_token(stack: ExitStack) -> None:
    """A continued request knows one token less than was delivered."""

    def continued(self: Failover, delivered: list[int]) -> Request:
        request = self.original.continued(delivered[:-1])
        object.__setattr__(request, "num_output_tokens", len(delivered))
        return request

    replace(stack, Failover, "continued", continued)


@mutation
def _load_is_not_given_back(stack: ExitStack) -> None:
    """Count load without finally: a cancelled request's load stays in the book."""
    close = Account.close

    def close_unless_in_use(self: Account) -> None:
        if not self.tokens:
            close(self)

    replace(stack, Account, "close", close_unless_in_use)


@mutation
def _silent_router_is_kept(stack: ExitStack) -> None:
    """A silent router's requests are kept for ever."""
    expire = Peers.expire

    def expire_others(self: Peers[Any, Any], now: float) -> list[tuple[Peer[Any, Any], Loss]]:
        return [] if any(isinstance(peer.value, Session) for peer in self) else expire(self, now)

    replace(stack, Peers, "expire", expire_others)


@mutation
def _merge_drops_the_first(stack: ExitStack) -> None:
    """Without credit, only the newest tokens of a request wait."""

    add = StreamQueue.add

    def add_alone(self: StreamQueue[Any, Any], request_id: str, *rest: Any) -> None:
        self.drop(request_id)
        add(self, request_id, *rest)

    replace(stack, StreamQueue, "add", add_alone)


# --- messages ----------------------------------------------------------------------------------------


@mutation
def _duplicates_are_news(stack: ExitStack) -> None:
    """A message that comes twice is taken twice."""
    take = Incoming.take

    def take_again(self: Incoming, epoch: int, number: int) -> Verdict:
        verdict = take(self, epoch, number)
        return Verdict.NEXT if verdict is Verdict.DUPLICATE else verdict

    replace(stack, Incoming, "take", take_again)


@mutation
def _losses_are_fine(stack: ExitStack) -> None:
    """A lost message is not noticed."""
    take = Incoming.take

    def take_on(self: Incoming, epoch: int, number: int) -> Verdict:
        verdict = take(self, epoch, number)
        return Verdict.NEXT if verdict is Verdict.GAP else verdict

    replace(stack, Incoming, "take", take_on)


@mutation
def _credit_is_not_given_back(stack: ExitStack) -> None:
    """A consumer gives no credit back."""
    replace(stack, CreditMeter, "consumed", lambda self: 0)


@mutation
def _nobody_is_ever_lost(stack: ExitStack) -> None:
    """Silence and standstill are not noticed."""
    replace(stack, Peers, "expire", lambda self, now: [])


# --- index -------------------------------------------------------------------------------------------


@mutation
def _ignore_the_incarnation(stack: ExitStack) -> None:
    """Ignore the incarnation: events of a new life are taken for the old one's."""
    receive = FeedState.receive

    def receive_any(self: FeedState[Any], batch: Any, now: float) -> Any:
        if self.live and self.epoch is not None and batch.seq >= self.next_seq:
            return [self._apply(batch)]
        return receive(self, batch, now)

    replace(stack, FeedState, "receive", receive_any)


@mutation
def _gaps_are_fine(stack: ExitStack) -> None:
    """A gap in an engine's events is not noticed."""
    receive = FeedState.receive

    def receive_on(self: FeedState[Any], batch: Any, now: float) -> Any:
        if self.live and batch.epoch == self.epoch and batch.seq > self.next_seq:
            return [self._apply(batch)]
        return receive(self, batch, now)

    replace(stack, FeedState, "receive", receive_on)


@mutation
def _snapshot_names_the_wrong_batch(stack: ExitStack) -> None:
    """A snapshot claims to hold one batch more than it does."""
    snapshot = ActionServer._snapshot

    def snapshot_ahead(self: ActionServer, call_id: int) -> tuple[SnapshotReply, bytes]:
        reply, bulk = snapshot(self, call_id)
        assert isinstance(reply, SnapshotReply)
        return SnapshotReply(reply.call_id, reply.epoch, reply.seq + 1), bulk

    replace(stack, ActionServer, "_snapshot", snapshot_ahead)


# --- hunting -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Catch:
    """``seeds`` meshes were run until one showed the bug; None: none of them did."""

    name: str
    seeds: int | None
    seen: str
    cpu_s: float
    """Of one core."""


@contextmanager
def planted(name: str) -> Iterator[None]:
    with MUTATIONS[name]():
        yield


def _run(name: str, seed: int) -> list[str]:
    scenario = draw(seed)
    if name in GUIDED:
        scenario = guided(scenario)
    elif name in SCORED:
        scenario = scored(scenario)
    return run_seed(seed, scenario=scenario).violations


def hunt(name: str, limit: int = LIMIT_SEEDS) -> Catch:
    """Run seeds with the bug planted until the judge sees it."""
    started = time.process_time()
    for seed in range(limit):
        with planted(name):
            violations = _run(name, seed)
        if violations and not _run(name, seed):  # else it is not the bug that is seen
            return Catch(name, seed + 1, violations[0], time.process_time() - started)
    return Catch(name, None, "", time.process_time() - started)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--limit", type=int, default=LIMIT_SEEDS, help="seeds for each bug")
    parser.add_argument("--only", default="", help="bugs whose name holds this")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    missed, cpu_s = 0, 0.0
    print(f"{'seeds':>6} {'s':>6}  planted bug", flush=True)
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        chosen = [name for name in MUTATIONS if options.only in name]
        hunts = [pool.apply_async(hunt, (name, options.limit)) for name in chosen]
        for pending in hunts:
            catch = pending.get()
            missed, cpu_s = missed + (catch.seeds is None), cpu_s + catch.cpu_s
            print(f"{catch.seeds or 'NONE':>6} {catch.cpu_s:>6.1f}  {catch.name}", flush=True)
            print(f"{'':>13}  {catch.seen[:100]}", flush=True)
    caught = f"{len(chosen) - missed} of {len(chosen)} caught within {options.limit} seeds"
    print(f"{caught}, in {cpu_s / 60:.1f} minutes of one core")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
