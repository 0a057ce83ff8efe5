"""Receives that are started early, in any order of everybody's acts, against what vLLM does with blocks.

A model of vLLM plays steps that do not overlap: it promotes, caches, shares, fails and frees as its scheduler
does, and knows of each cached block whether its KV is right. Held are three promises: nobody gets a token
from KV that was not in, no block is given back while a writer may write into it, nothing is lost or kept.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field

import pytest

from microserve.protocol.errors import InternalError
from microserve.services.engine.vllm.connector.loading import Reports
from microserve.services.engine.vllm.connector.receives import Receives
from microserve.services.engine.vllm.link import (
    DROP,
    START,
    TAKE,
    WAIT,
    Allocated,
    Freed,
    Generate,
    Notice,
    Receive,
    Received,
)

SIZE = 4
NUM_BLOCKS = 40
END = 2 * SIZE


@dataclass(eq=False)
class Request:
    name: str
    tokens: list[int]
    after: int = -1
    blocks: list[int] = field(default_factory=list)
    num_hit: int = 0
    status: str = "waiting"


class Walk:
    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.words: dict[int, int] = {}
        self.started: set[int] = set()
        self.heard: list[Notice] = []
        self.receives = Receives(SIZE, self.fate, self.heard.append, self.evict)
        self.reports = Reports(self.fate, self.started.__contains__)
        self.refs: Counter[int] = Counter()
        self.cached: dict[tuple[int, ...], int] = {}
        self.good: dict[int, bool] = {}
        self.requests: dict[str, Request] = {}
        self.reported: set[str] = set()
        self.arrived: set[int] = set()
        self.closed: set[int] = set()
        self.writing: set[int] = set()
        """Receives into whose blocks somebody may write."""
        self.parked: dict[int, Request] = {}
        self.early_seen = 0
        self.next = 0

    def fate(self, receive: int) -> int:
        return self.words.get(receive, WAIT)

    def evict(self, blocks: set[int]) -> None:
        self.cached = {key: block for key, block in self.cached.items() if block not in blocks}

    # --- acts between steps --------------------------------------------------------------------------

    def comes(self) -> None:
        """A receive with its generation, or a stranger of the same prompt."""
        self.next += 1
        tokens = [self.chance.randrange(2)] * END
        longer = [*tokens, *[7] * (SIZE + 1)]
        if self.chance.random() < 0.4:
            name = f"o{self.next}"
            self.requests[name] = Request(name, longer)
            return
        name = f"r{self.next}"
        self.requests[name] = self.parked[self.next] = Request(name, tokens)
        assert self.receives.add(name, Receive(self.next, END), END, tokens) is None
        if self.chance.random() < 0.8:
            self.receives.add_generate(f"g{self.next}", Generate(self.next))
            self.requests[f"g{self.next}"] = Request(f"g{self.next}", longer, self.next)

    def a_front_acts(self) -> None:
        """On one that is granted and not taken: starts it, has it arrive, closes it; writers let go."""
        granted = [each for each in self.writing if self.fate(each) in (WAIT, START)]
        if not granted:
            return
        receive = self.chance.choice(granted)
        match self.chance.randrange(4):
            case 0 if receive not in self.closed and self.fate(receive) == WAIT:
                self.words[receive] = START
                self.started.add(receive)
            case 1 if receive not in self.closed:
                self.arrived.add(receive)
            case 2:
                self.close(receive)
            case 3:
                self.lets_go(receive)

    def close(self, receive: int) -> None:
        self.closed.add(receive)
        if receive not in self.started:
            self.abort(f"r{receive}")
        if self.chance.random() < 0.5:
            self.abort(f"g{receive}")

    def lets_go(self, receive: int) -> None:
        if receive in self.closed:
            self.writing.discard(receive)
            self.words[receive] = DROP
        elif receive in self.arrived and (receive not in self.started or self.was_in(receive)):
            self.writing.discard(receive)
            self.good |= dict.fromkeys(self.granted(receive), True)
            self.words[receive] = TAKE

    def was_in(self, receive: int) -> bool:
        return receive in self.verified

    verified: set[int]

    def granted(self, receive: int) -> list[int]:
        return next(each.blocks for each in self.heard if isinstance(each, Allocated) and each.id == receive)

    def abort(self, name: str) -> None:
        request = self.requests.get(name)
        if request is not None and request.status not in ("kept",):
            self.finish(request, has_output=request.status == "computed")

    # --- vLLM ----------------------------------------------------------------------------------------

    def finish(self, request: Request, *, has_output: bool) -> None:
        was_parked = request.status == "parked"
        keeps = self.receives.finished(request.name, request.blocks, has_output=has_output)
        if keeps or (was_parked and request.name not in self.reported):
            request.status = "kept"
        else:
            self.free(request)
        self.reported.discard(request.name)

    def free(self, request: Request) -> None:
        for block in request.blocks:
            self.refs[block] -= 1
            owner = [each for each in self.writing if block in self.granted(each)]
            assert self.refs[block] or not owner, f"block {block} is free, and {owner} may be written"
        del self.requests[request.name]

    def allocate(self, num: int) -> list[int]:
        cached = set(self.cached.values())
        free = [block for block in range(NUM_BLOCKS) if not self.refs[block]]
        free.sort(key=cached.__contains__)
        assert len(free) >= num
        self.evict(set(free[:num]))
        for block in free[:num]:
            self.refs[block] += 1
        return free[:num]

    def hits(self, tokens: list[int]) -> list[int]:
        found: list[int] = []
        while (len(found) + 1) * SIZE < len(tokens):
            block = self.cached.get(tuple(tokens[: (len(found) + 1) * SIZE]))
            if block is None:
                break
            found.append(block)
        return found

    def cache(self, request: Request) -> None:
        for i, block in enumerate(request.blocks):
            if (i + 1) * SIZE <= len(request.tokens):
                self.cached.setdefault(tuple(request.tokens[: (i + 1) * SIZE]), block)

    def step(self) -> None:
        running = []
        for request in [each for each in self.requests.values() if each.name in self.reported]:
            self.reported.discard(request.name)
            self.cache(request)
            self.receives.allocated(request.name, request.blocks, 0)
            request.status = "running"
            running.append(request)
        for request in [each for each in self.requests.values() if each.status == "waiting"]:
            found = self.hits(request.tokens)
            if sum(not self.refs[block] for block in range(NUM_BLOCKS)) < 4:
                continue
            external, is_async = self.receives.num_external(request.name, len(found) * SIZE, request.tokens)
            if external is None:
                continue
            for block in found:
                self.refs[block] += 1
            request.num_hit = len(found)
            request.blocks = found + self.allocate(-(-len(request.tokens) // SIZE) - len(found))
            self.receives.allocated(request.name, request.blocks, external)
            if is_async:
                request.status = "parked"
                self.writing.add(int(request.name[1:]))
                self.good |= dict.fromkeys(request.blocks[request.num_hit :], False)
            else:
                self.cache(request)
                request.status = "running"
                running.append(request)
        started = self.receives.started([each.name for each in running])
        watched, releases = self.receives.watched(), self.receives.releases()

        # The worker: a layer that does not come ends by its grant's being closed.
        invalid: set[int] = set()
        for load in started:
            self.early_seen += 1
            if load.id not in self.arrived and load.id not in self.closed:
                if self.chance.random() < 0.5:
                    self.arrived.add(load.id)
                else:
                    self.close_in_step(load.id)
            if load.id in self.arrived and self.fate(load.id) == START:
                self.verified.add(load.id)
                self.good |= dict.fromkeys(load.blocks, True)
            else:
                invalid |= set(load.blocks)
        is_right = {}
        for request in running:
            used = request.blocks[: request.num_hit] if not request.name.startswith("r") else request.blocks
            is_right[request.name] = all(self.good[block] for block in used)
            own = [] if request.name.startswith("r") else request.blocks[request.num_hit :]
            self.good |= dict.fromkeys(own, is_right[request.name])
        for request in [each for each in self.requests.values() if each.status == "computed"]:
            assert all(self.good[block] for block in request.blocks), f"{request.name} goes on from nothing"
        due = {each.request_id for each in self.reports.due(watched)}
        for release in releases:  # they are cleared
            self.good |= dict.fromkeys(release.blocks, False)

        # Aborts that came meanwhile, then the output.
        for request in [each for each in running if each.name.startswith("g")]:
            if self.chance.random() < 0.2:
                self.finish(request, has_output=False)
        alive = [
            each for each in running if self.requests.get(each.name) is each and each.status == "running"
        ]
        failed = [each for each in alive if invalid.intersection(each.blocks)]
        for request in failed:
            self.evict(set(request.blocks[next(i for i, b in enumerate(request.blocks) if b in invalid) :]))
        for request in alive:
            if request not in failed:
                assert is_right[request.name], f"{request.name} has a token from KV that was not in"
                request.status = "computed"
                if request.name.startswith("r") or self.chance.random() < 0.5:
                    self.finish(request, has_output=True)
        for request in failed:
            assert request.name[0] in "rg", "a stranger is failed"
            self.finish(request, has_output=False)
        self.receives.ran(invalid)
        self.receives.reported(due)
        self.receives.released({each.request_id for each in releases})
        for name in due:
            request = self.requests[name]
            if request.status == "parked":
                self.reported.add(name)
            else:
                assert request.status == "kept"
                self.free(request)
        for release in releases:
            self.free(self.requests[release.request_id])
        for request in [each for each in self.requests.values() if each.status == "computed"]:
            if self.chance.random() < 0.3:
                self.finish(request, has_output=True)
        assert all(self.good[block] for block in self.cached.values()), "bad KV can be found"

    def close_in_step(self, receive: int) -> None:
        self.closed.add(receive)
        if self.chance.random() < 0.5:
            self.lets_go(receive)

    def run(self, num_acts: int) -> None:
        self.verified = set()
        acts = [self.comes, self.a_front_acts, self.a_front_acts, self.a_front_acts, self.step]
        for _ in range(num_acts):
            self.chance.choice(acts)()
        for receive in list(self.parked):
            if receive in self.writing and receive not in self.verified:
                self.close(receive)
        for _ in range(12):
            for receive in list(self.writing):
                self.lets_go(receive)
            for receive in self.parked:
                self.abort(f"g{receive}")
                if self.fate(receive) == TAKE and Received(receive) in self.heard:
                    self.words[receive] = DROP
                elif self.fate(receive) == WAIT:
                    self.abort(f"r{receive}")
            for name in [each for each in self.requests if each.startswith("o")]:
                self.abort(name)
            self.step()
        assert self.requests == {} and self.receives.num_held == 0
        assert not +self.refs
        freed = Counter(notice.id for notice in self.heard if isinstance(notice, Freed))
        assert freed == dict.fromkeys(self.parked, 1)


@pytest.mark.quick
def test_what_was_not_in_leaves_the_cache_though_vllm_knows_nobody_who_has_it() -> None:
    walk = Walk(0)
    assert walk.receives.add("r1", Receive(1, END), END, [1] * END) is None
    walk.receives.allocated("r1", [3, 4], END)
    walk.words[1] = START
    walk.receives.reported({"r1"})
    assert [each.blocks for each in walk.receives.started(["r1", "other"])] == [[3, 4]]
    walk.cached = {(1,): 3, (2,): 5}
    walk.receives.ran({4})
    assert walk.cached == {(2,): 5}


@pytest.mark.quick
@pytest.mark.parametrize("why", ["aborted", "preempted"])
def test_what_would_give_blocks_away_under_a_writer_ends_the_engine(why: str) -> None:
    """Nobody here does either; vLLM would go on as if nothing were."""
    walk = Walk(0)
    assert walk.receives.add("r1", Receive(1, END), END, [1] * END) is None
    walk.receives.allocated("r1", [3, 4], END)
    walk.words[1] = START
    if why == "aborted":
        assert walk.receives.finished("r1")
        with pytest.raises(InternalError, match="aborted"):
            walk.receives.reported({"r1"})
    else:
        walk.receives.reported({"r1"})
        walk.receives.started(["r1"])
        with pytest.raises(InternalError, match="preempted"):
            walk.receives.num_external("r1", 0)


@pytest.mark.quick
@pytest.mark.parametrize("seed", range(12))
def test_a_short_walk(seed: int) -> None:
    Walk(seed).run(60)


def test_many_walks() -> None:
    num_early = 0
    for seed in range(100, 600):
        walk = Walk(seed)
        walk.run(90)
        num_early += walk.early_seen
    assert num_early > 500, "walks that meet what they are for"
