"""Thousands of requests of a hybrid model of hashes over two small engines: no other token, no block lost."""

from __future__ import annotations

import random
from contextlib import suppress

import pytest

from microserve.protocol.errors import CacheFull, InvalidRequest, MeshError, UnknownRequest
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.engine.core.coding.choice import CodecOptions
from tests.support.engine.core_mesh import GREEDY, ROUTER, Engine, generate, grant_for, receive, send
from tests.support.engine.hybrid_hash import HybridHashMesh, expect


class CodingMesh(HybridHashMesh):
    codecs = CodecOptions(num_threads=0)


class Crowd:
    def __init__(self, seed: int) -> None:
        self.rng = rng = random.Random(seed)
        self.mesh = HybridHashMesh(num_blocks=40, max_model_len=80, max_num_batched_tokens=24)
        self.bases = [[rng.randrange(500) for _ in range(40)] for _ in range(4)]
        self.asked: dict[str, tuple[Engine, list[int], int]] = {}
        """Of each generation where it is, its prompt, and the call whose answer has its first token."""
        self.met: set[str] = set()

    def prompt(self) -> list[int]:
        rng = self.rng
        own = [rng.randrange(500) for _ in range(rng.randint(0, 9))]
        return [*rng.choice(self.bases)[: rng.randint(1, 40)], *own]

    def ask(self, number: int) -> None:
        rng, mesh, name = self.rng, self.mesh, f"r{number}"
        sender, receiver = (mesh.a, mesh.b) if rng.random() < 0.5 else (mesh.b, mesh.a)
        prompt = self.prompt()
        params = SamplingParams(max_tokens=rng.randint(1, 9), temperature=0.0, ignore_eos=True)
        kind = rng.choice(["alone", "alone", "relay", "relay", "move"])
        try:
            if kind == "alone":
                generate(receiver, name, prompt, params)
                self.asked[name] = (receiver, prompt, 0)
                return
            end = rng.randint(1, len(prompt))
            granted = grant_for(receiver, name, prompt, end)
        except CacheFull:
            return
        if kind == "move":
            commit = wire.Commit(mesh.call(), name, granted.grant.grant_id, 60.0)
            receiver.core.actions.commit(ROUTER, commit, mesh.now)
        else:
            first = end == len(prompt) and rng.random() < 0.7
            receive(receiver, name, granted, end, params, await_first=first)
            self.asked[name] = (receiver, prompt, 0)
        if rng.random() < 0.03:
            self.met.add("nobody sends")
            return
        cut = rng.randint(granted.grant.matched, end)
        parts = [(granted.grant.matched, cut), (cut, end)] if rng.random() < 0.4 else [(0, end)]
        for lane, (begin, stop) in enumerate(parts):
            is_first = kind == "relay" and stop == end and first
            if begin == stop and not is_first:
                continue
            sampling = params if is_first else None
            with suppress(InvalidRequest):
                call = send(sender, name, prompt, granted, begin, stop, lane=lane, sampling=sampling)
                if is_first:
                    self.asked[name] = (receiver, prompt, call)

    def harm(self) -> None:
        rng, mesh = self.rng, self.mesh
        engine = rng.choice([mesh.a, mesh.b])
        name = f"r{rng.randrange(max(1, len(self.asked)))}"
        with suppress(UnknownRequest):
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), name), mesh.now)

    def check(self) -> int:
        whole = 0
        for name, (engine, prompt, call) in self.asked.items():
            finished = engine.finished.get(name)
            if finished is None or finished.reason != "length":
                continue
            usage, tokens = finished.usage, list(engine.tokens[name])
            if tokens[:1] == [-1]:
                sent = (self.mesh.a if engine is self.mesh.b else self.mesh.b).replies[call]
                assert isinstance(sent, wire.Sent) and sent.first_token is not None
                tokens[0] = sent.first_token
            assert tokens == expect(tuple(prompt), len(tokens)), name
            self.met |= {"preempted"} if usage.num_preemptions else set()
            self.met |= {"cached"} if usage.cached_tokens else set()
            self.met |= {"received"} if usage.received_tokens else set()
            whole += 1
        return whole


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 1_000), (2, 1_000), pytest.param(3, 10_000, marks=pytest.mark.heavy)]
)
def test_nothing_is_wrong_or_lost_in_a_crowd(seed: int, count: int) -> None:
    crowd = Crowd(seed)
    for number in range(count):
        with suppress(MeshError):  # the queue is full
            crowd.ask(number)
        for _ in range(crowd.rng.randint(0, 9)):
            crowd.mesh.now += 0.01
            crowd.rng.choice([crowd.mesh.a, crowd.mesh.b]).step()
        if crowd.rng.random() < 0.1:
            crowd.harm()
    crowd.mesh.now += 70.0
    crowd.mesh.run()
    whole = crowd.check()
    assert whole > count // 4
    assert crowd.met == {"preempted", "cached", "received", "nobody sends"}
    crowd.mesh.close()


def test_a_codec_leaves_kv_and_state_as_they_are() -> None:
    mesh = CodingMesh()
    prompt = [7, *range(30)]
    granted = grant_for(mesh.b, "r", prompt, 30)
    call = send(mesh.a, "r", prompt, granted, 0, 30, codec="lossless-zstd")
    receive(mesh.b, "r", granted, 30, GREEDY)
    mesh.run()
    assert mesh.b.tokens["r"] == expect(tuple(prompt), GREEDY.max_tokens)
    sent, layout = mesh.a.replies[call], mesh.a.core.layout
    assert isinstance(sent, wire.Sent) and sent.coding is not None
    assert sent.coding.profile == "none"
    whole = layout.num_layers * (30 * 2 * layout.row_nbytes + layout.num_state_blocks * layout.block_nbytes)
    assert sent.nbytes == sent.coding.wire_nbytes == sent.coding.raw_nbytes == whole
    mesh.close()
