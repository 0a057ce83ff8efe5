"""A receiver whose blocks are used again at once: the next user of what a late write would hit.

    engine b   has given the grant that ended; each of its turns, a new request takes all that is free
    engine c   sends the KV of such requests where they receive it

Time passes only by ``mesh.now``. Does not know which faults are tried (case.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from microserve.protocol.errors import CacheFull
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.simulation.engine.hash_runner import expected_tokens
from tests.support.engine.core_mesh import ROUTER, VOCAB, Engine, Mesh, prompt_of

BLOCK_SIZE = 4
NUM_BLOCKS = 10
"""A grant pins at most half of them: 4, and one to spare."""
OPTIONS = {"num_blocks": NUM_BLOCKS, "num_slots": 1, "max_num_batched_tokens": 6, "block_size": BLOCK_SIZE}
"""One slot: the next grant takes over the control words as soon as the engine lets them be."""
SCATTERED = [6, 3, 8, 1, 9, 4, 0, 7, 2, 5]
LONG_S = 80_000.0
NEXT = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
"""What the requests that reuse the blocks ask for."""


@dataclass(frozen=True)
class Occupant:
    """A request that took every block that was free when it came."""

    request_id: str
    prompt: tuple[int, ...]
    first_by: int | None = None
    """Call of the send that brings its first token, if it is received from another engine."""


class Receiver:
    """Engine b: each turn it steps, and a new request takes all that is free once the last has ended."""

    def __init__(self, mesh: Mesh, *, receives: bool) -> None:
        """``receives``: new requests get their KV from a third engine, where a slot is free for a grant."""
        self.mesh, self.engine = mesh, mesh.b
        self.helper = Engine(mesh, "c", 33, **OPTIONS)
        self.receives = receives
        self.is_occupying = False
        self.occupants: list[Occupant] = []
        self.refused: list[Occupant] = []
        """Their own sender was not let in, which their router was told at once."""
        # Blocks that no slice merges with its neighbour.
        pool = mesh.b.core.memory.pool
        pool.allocate(NUM_BLOCKS)
        pool.free(SCATTERED)

    def turn(self) -> None:
        self.mesh.now += 0.001
        if self.is_occupying and all(o.request_id in self.engine.finished for o in self.occupants):
            self._occupy()
        self.helper.step()
        self._take_refusal()
        self.engine.step()

    def occupy(self) -> None:
        """From now on nothing stays free. Until the newest request has read its blocks a few times."""
        self.is_occupying = True
        for _ in range(24):
            self.turn()
            if self.occupants:
                newest = self.occupants[-1].request_id
                if newest not in self.engine.finished and len(self.engine.tokens.get(newest, ())) >= 2:
                    return

    def rest(self) -> None:
        """No new requests; those that are here come to their end."""
        self.is_occupying = False
        for _ in range(200):
            self.turn()
            if not self.engine.core.state.num_requests and not self.helper.core.state.num_requests:
                return

    def _take_refusal(self) -> None:
        """What a router does when the send of a request fails."""
        call = self.occupants[-1].first_by if self.occupants else None
        if call is not None and isinstance(self.helper.replies.get(call), wire.Failed):
            refused = self.occupants.pop()
            message = wire.Abort(self.mesh.call(), refused.request_id)
            self.engine.core.actions.abort(ROUTER, message, self.mesh.now)
            self.refused.append(refused)

    def _occupy(self) -> None:
        number, pool = len(self.occupants) + len(self.refused), self.engine.core.memory.pool
        if self.receives and self._receive(number):
            return
        length = pool.num_free * BLOCK_SIZE - NEXT.max_tokens
        if length > 0:
            prompt = prompt_of(length, seed=1000 + number)
            self.occupants.append(Occupant(f"next{number}", tuple(prompt)))
            self.generate(f"next{number}", prompt)

    def _receive(self, number: int) -> bool:
        """False where the one slot is in use, or too few blocks are free."""
        prompt, request_id, mesh = prompt_of(15, seed=1000 + number), f"next{number}", self.mesh
        if self.engine.core.memory.pool.num_free * BLOCK_SIZE < len(prompt) + NEXT.max_tokens:
            return False
        end = len(prompt)
        try:
            granted = self.engine.core.actions.prep_recv(
                ROUTER, wire.PrepRecv(mesh.call(), request_id, end, LONG_S), prompt, mesh.now
            )
        except CacheFull:
            return False
        grant, call = granted.grant, mesh.call()
        start = wire.StartGenerate(mesh.call(), request_id, end, NEXT, LONG_S, grant.grant_id, True)
        self.engine.core.actions.start_generate(ROUTER, start, None, mesh.now)
        message = wire.RemoteSend(call, request_id, 0, end, grant, 0, LONG_S, NEXT)
        self.helper.core.actions.remote_send(ROUTER, message, prompt, mesh.now)
        self.occupants.append(Occupant(request_id, tuple(prompt), call))
        return True

    def generate(self, request_id: str, prompt: list[int]) -> None:
        message = wire.StartGenerate(self.mesh.call(), request_id, 0, NEXT, LONG_S)
        self.engine.core.actions.start_generate(ROUTER, message, prompt, self.mesh.now)

    def answer(self, occupant: Occupant) -> list[int] | str:
        """Its tokens, or why there are none."""
        finished = self.engine.finished.get(occupant.request_id)
        if finished is None:
            return "never ended"
        if finished.reason != "length":
            return f"{finished.reason}: {finished.detail}"
        tokens = self.engine.tokens[occupant.request_id]
        if occupant.first_by is None:
            return tokens
        sent = self.helper.replies[occupant.first_by]
        if not isinstance(sent, wire.Sent) or sent.first_token is None:
            return f"its sender says {sent}"
        return [sent.first_token, *tokens[1:]]


@lru_cache(None)
def oracle(prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    """The greedy tokens of a lone run."""
    params = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return tuple(expected_tokens(prompt, params, vocab_size=VOCAB))
