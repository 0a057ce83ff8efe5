"""One case of the late-write enumeration: a transfer, what ends its grant while it stands before some
operation, and what becomes of its sender after.

Owns the lists of transfers, actions and fates, and what must hold at the end of each case.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.grant import Grant
from tests.support.engine.core_mesh import GREEDY, ROUTER, Mesh, generate, prompt_of
from tests.support.engine.late_write.late_write import Sender
from tests.support.engine.late_write.receiver import (
    BLOCK_SIZE,
    LONG_S,
    NEXT,
    OPTIONS,
    Occupant,
    Receiver,
    oracle,
)

SHORT_S = 2.0
"""Time of a request that is to run out of it: less than a lease."""
FROZEN_S = 20_000.0
TURNS_WHILE_FROZEN = 6


@dataclass(frozen=True)
class Transfer:
    """KV of ``[begin, end)`` of a prompt from a to b; ``c`` has brought what lies before ``begin``."""

    name: str
    length: int = 13
    end: int = 13
    begin: int = 0
    cached_here: int = 0
    """Tokens that the receiver has already."""
    cached_there: int = 0
    aborted_at: int | None = None
    """The sender is told to abort before this operation, whatever happens to the receiver."""

    @property
    def prompt(self) -> list[int]:
        return prompt_of(self.length)


WHOLE = Transfer("whole prompt and first token")
EARLY = Transfer("part of the prompt, receiver starts early", length=15, end=9)
FAILING = Transfer("given up by its sender", aborted_at=20)
TRANSFERS = (
    WHOLE,
    Transfer("matched on both sides", cached_here=4, cached_there=8),
    EARLY,
    Transfer("second of two lanes, from inside a block", begin=5),
    FAILING,
)


@dataclass(frozen=True)
class Action:
    """What ends the receiver's interest."""

    name: str
    waits: str
    """What has consumed the grant before: a ``generate``, a ``commit`` or nothing."""
    act: Callable[[Case], None]


def _abort(case: Case) -> None:
    case.mesh.b.core.actions.abort(ROUTER, wire.Abort(case.mesh.call(), "r"), case.mesh.now)


def _release(case: Case) -> None:
    message = wire.Release(case.mesh.call(), "r", case.grant.grant_id)
    case.mesh.b.core.actions.release(ROUTER, message, case.mesh.now)


def _lose_router(case: Case) -> None:
    case.mesh.b.core.state.drop_owner(ROUTER, case.mesh.now)


def _pass_deadline(case: Case) -> None:
    case.mesh.now += SHORT_S + 1.0


def _pass_lease(case: Case) -> None:
    case.mesh.now += case.grant.lease_s + 1.0


ACTIONS = (
    Action("abort", "nothing", _abort),
    Action("release", "nothing", _release),
    Action("lease over", "nothing", _pass_lease),
    Action("abort of a generate", "generate", _abort),
    Action("deadline of a generate", "generate", _pass_deadline),
    Action("router of a generate lost", "generate", _lose_router),
    Action("abort of a commit", "commit", _abort),
    Action("deadline of a commit", "commit", _pass_deadline),
)
FATES = ("goes on", "is told to abort", "dies", "freezes")


@dataclass
class Outcome:
    operation: str
    wrong: list[str] = field(default_factory=list)
    """Requests that were answered with tokens other than the oracle's."""
    broken: list[str] = field(default_factory=list)
    """Anything else that may not be: hangs, failures, leaks."""
    is_reused: bool = False
    """Some of the blocks had a new user before the delayed operation came."""
    is_mid_step: bool = False
    """The action came while the receiver's own step waited for KV."""
    num_refused: int = 0
    """New requests whose own sender was not let in."""


class Case:
    def __init__(self, transfer: Transfer, action: Action, *, receives: bool = False) -> None:
        self.transfer, self.action = transfer, action
        mesh = self.mesh = Mesh(**OPTIONS)
        self.receiver = Receiver(mesh, receives=receives)
        prompt = transfer.prompt
        for engine, cached in ((mesh.b, transfer.cached_here), (mesh.a, transfer.cached_there)):
            if cached:
                generate(engine, "warm", prompt[:cached])
                mesh.run()
        self.sender = Sender(mesh.a)
        prep = wire.PrepRecv(mesh.call(), "r", transfer.end, LONG_S)
        self.grant: Grant = mesh.b.core.actions.prep_recv(ROUTER, prep, prompt, mesh.now).grant
        self._consume()
        is_whole = transfer.end == transfer.length
        lane = 1 if transfer.begin else 0
        if lane:
            helper = self.receiver.helper
            before = wire.RemoteSend(mesh.call(), "r", 0, transfer.begin, self.grant, 0, LONG_S)
            helper.core.actions.remote_send(ROUTER, before, prompt, mesh.now)
            while helper.step():
                pass
        self.send_call = mesh.call()
        send = wire.RemoteSend(
            self.send_call,
            "r",
            transfer.begin,
            transfer.end,
            self.grant,
            lane,
            LONG_S,
            GREEDY if is_whole else None,
        )
        mesh.a.core.actions.remote_send(ROUTER, send, prompt, mesh.now)

    def _consume(self) -> None:
        transfer, mesh = self.transfer, self.mesh
        ttl_s = SHORT_S if self.action.act is _pass_deadline else LONG_S
        if self.action.waits == "generate":
            await_first = transfer.end == transfer.length
            start = wire.StartGenerate(
                mesh.call(), "r", transfer.end, GREEDY, ttl_s, self.grant.grant_id, await_first
            )
            mesh.b.core.actions.start_generate(ROUTER, start, None, mesh.now)
        elif self.action.waits == "commit":
            commit = wire.Commit(mesh.call(), "r", self.grant.grant_id, ttl_s)
            mesh.b.core.actions.commit(ROUTER, commit, mesh.now)

    # --- the sender ----------------------------------------------------------------------------------

    def advance_to(self, point: int) -> None:
        """Up to before operation ``point``; the point after the last one is the transfer's end."""
        while len(self.sender.operations) <= point:
            if self.transfer.aborted_at == len(self.sender.operations) - 1:
                self.abort_sender()
            if not self.sender.advance():
                return

    def abort_sender(self) -> None:
        self.mesh.a.core.actions.abort(ROUTER, wire.Abort(self.mesh.call(), "r"), self.mesh.now)

    def release_sender(self) -> None:
        """Operation after operation, the receiver takes a turn after each."""
        if self.sender.is_done:
            self.sender.restart()
        while self.sender.advance():
            self.receiver.turn()
        self.receiver.turn()

    # --- the case ------------------------------------------------------------------------------------

    def run(self, point: int, fate: str) -> Outcome:
        self.advance_to(point)
        outcome = Outcome("end" if self.sender.is_done else self.sender.operations[point])
        outcome.is_mid_step = self._act()
        self._check_quarantine(outcome)
        self.receiver.occupy()
        outcome.is_reused = self._is_reused()
        self._meet(fate, outcome)
        self.receiver.rest()
        self._check(fate, outcome)
        outcome.num_refused = len(self.receiver.refused)
        return outcome

    def _act(self) -> bool:
        """The receiver takes in what has arrived; then, maybe in the middle of its step, the action."""
        engine = self.mesh.b
        self.mesh.arrived = lambda: self.action.act(self)
        for _ in range(3):
            engine.step()
        is_mid_step = self.mesh.arrived is None
        if not is_mid_step:
            self.mesh.arrived = None
            self.action.act(self)
        for _ in range(2):
            engine.step()
        return is_mid_step

    def _meet(self, fate: str, outcome: Outcome) -> None:
        mesh, sender = self.mesh, self.sender
        if fate == "dies":
            mesh.registry.kill(mesh.a.core.incarnation)
            sender.vanish()
            for _ in range(3):
                self.receiver.turn()
            return
        if fate == "freezes":
            for _ in range(TURNS_WHILE_FROZEN):
                self.receiver.turn()
            mesh.now += FROZEN_S
            self.receiver.occupy()
            self._check_quarantine(outcome)
        is_late = fate == "is told to abort" and sender.is_booking
        if fate == "is told to abort" and not is_late:
            self.abort_sender()
        self.release_sender()
        if is_late:
            self.abort_sender()
            self.release_sender()

    def _is_reused(self) -> bool:
        pool = self.mesh.b.core.memory.pool
        return any(pool.ref_count(block) for block in self.grant.blocks)

    # --- what must hold ------------------------------------------------------------------------------

    def _check_quarantine(self, outcome: Outcome) -> None:
        """No block comes back while the sender holds its lane, and none stays away when it does not."""
        core = self.mesh.b.core
        lane = (core.incarnation, self.grant.slot, 1 if self.transfer.begin else 0)
        is_held = self.mesh.registry._holders.get(lane) == self.mesh.a.core.incarnation
        want, found = len(self.grant.blocks) if is_held else 0, core.memory.pool.num_quarantined
        if found != want:
            outcome.broken.append(f"{found} blocks in quarantine, not {want}")

    def _check(self, fate: str, outcome: Outcome) -> None:
        mesh, receiver = self.mesh, self.receiver
        if not receiver.occupants:
            outcome.broken.append("no request took the blocks")
        else:
            last = receiver.occupants[-1]
            again = Occupant("again", (*last.prompt[:-1], 7))
            receiver.generate(again.request_id, list(again.prompt))
            receiver.rest()
            receiver.occupants.append(again)
            finished = mesh.b.finished.get("again")
            want = (len(again.prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
            if finished is not None and finished.usage.cached_tokens < want:
                outcome.broken.append(f"{finished.usage.cached_tokens} tokens cached, not {want}")
        for occupant in receiver.occupants:
            self._judge(occupant, outcome)
        self._check_first(outcome)
        engines = [mesh.b, receiver.helper]
        if fate != "dies":
            engines.append(mesh.a)
            if self.send_call not in mesh.a.replies:
                outcome.broken.append("the send was never answered")
        for engine in engines:
            engine.assert_clean()
            engine.core.close()

    def _judge(self, occupant: Occupant, outcome: Outcome) -> None:
        answer = self.receiver.answer(occupant)
        if isinstance(answer, str):
            outcome.broken.append(f"{occupant.request_id}: {answer}")
        elif tuple(answer) != oracle(occupant.prompt, NEXT.max_tokens):
            outcome.wrong.append(occupant.request_id)

    def _check_first(self, outcome: Outcome) -> None:
        """What the ended request was told before its end is a part of its right answer."""
        got = self.mesh.b.tokens.get("r", [])
        want = oracle(tuple(self.transfer.prompt), GREEDY.max_tokens)
        if any(token not in (-1, right) for token, right in zip(got, want, strict=False)):
            outcome.wrong.append("r")


def num_points(transfer: Transfer) -> int:
    """Operations of the whole transfer."""
    case = Case(transfer, ACTIONS[0])
    case.advance_to(1 << 30)
    return len(case.sender.operations)
