"""Everything at once and in any order, in a real vLLM: it lives, its answers are right, and nothing stays."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from microserve.kvcache.grant.writer import LaneWriter
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.link import DROP, TAKE, Allocated, Freed, Generate, SendFailed, Sent
from tests.support.vllm.exchange import fetch, prompt_of
from tests.support.vllm.hosted import Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
LENGTHS = (31, 64, 96, 100, 130)
NUM_ACTS = 160
CLOSE = 0.2


@dataclass
class Receiving:
    request_id: str
    receive: int
    which: int
    grant: Grant | None = None
    writer: LaneWriter | None = None
    is_written: bool = False
    is_aborted: bool = False
    word: int = 0


@dataclass
class Disorder:
    vllm: Hosted
    peer: Peer
    rng: random.Random
    prompts: list[list[int]]
    brought: list[Grant]
    expected: list[dict[str, Any]]
    """Each alone, with the two likeliest tokens of each position."""
    receivings: dict[int, Receiving] = field(default_factory=dict)
    generates: dict[str, int] = field(default_factory=dict)
    """By request, whose prompt."""
    sends: dict[int, tuple[str, Grant, int]] = field(default_factory=dict)

    def one(self, wanted: list[Receiving]) -> Receiving | None:
        return self.rng.choice(wanted) if wanted else None

    def act(self) -> None:
        acts = [
            self.begin,
            self.write,
            self.write,
            self.take,
            self.generate,
            self.abort,
            self.drop,
            self.send,
        ]
        self.rng.choice([*acts, self.abort_send, self.abort_generate, self.step, self.step, self.step])()
        self.listen()

    def begin(self) -> None:
        if len(self.receivings) < 4:
            which = self.rng.randrange(len(self.prompts))
            request_id, receive = self.vllm.begin_receive(self.prompts[which])
            self.receivings[receive] = Receiving(request_id, receive, which)

    def write(self) -> None:
        """A claim, or all that it is for."""
        each = self.one(
            [r for r in self.receivings.values() if r.grant and not r.is_written and not r.is_aborted]
        )
        if each is None or each.grant is None:
            return
        end = each.grant.end
        if each.writer is None:
            each.writer = self.peer.writer(self.vllm, each.grant, 0, end)
            each.writer.claim()
            return
        for layer in range(self.vllm.layout.num_layers):
            each.writer.put_layer(layer, self.brought[each.which].blocks, 0, end)
        each.writer.finish()
        each.is_written = True
        self.vllm.verify(each.grant)

    def take(self) -> None:
        if each := self.one([r for r in self.receivings.values() if r.is_written and r.word < TAKE]):
            each.word = TAKE
            self.vllm.front.page.take(each.receive)

    def generate(self) -> None:
        """From a receive, also twice, or from none."""
        if len(self.generates) >= 4:
            return
        each = self.one([r for r in self.receivings.values() if not r.is_aborted])
        which = each.which if each else self.rng.randrange(len(self.prompts))
        after = Generate(each.receive if each else 77 << 16)
        request_id = self.vllm.add(self.vllm.new_id("g"), self.prompts[which], after, max_tokens=4)
        self.generates[request_id] = which

    def abort(self) -> None:
        if each := self.one([r for r in self.receivings.values() if not r.is_aborted]):
            each.is_aborted = True
            self.vllm.call("abort", each.request_id)
            if each.grant is not None and not each.is_written:
                self.vllm.table.close(each.grant.grant_id, 0.0)

    def drop(self) -> None:
        """Where no writer is left, as the front does: an aborted one, or one that was taken."""
        each = self.one([r for r in self.receivings.values() if r.word < DROP and (r.is_aborted or r.word)])
        if each is None:
            return
        if each.writer is not None and not each.is_written:
            each.writer.fail()
        self.vllm.table.poll(0.0)
        each.word = DROP
        self.vllm.front.page.drop(each.receive)

    def send(self) -> None:
        if len(self.sends) < 2:
            which = self.rng.randrange(len(self.prompts))
            grant = self.peer.grant(len(self.prompts[which]))
            request_id, send = self.vllm.send(self.prompts[which], grant)
            self.sends[send] = request_id, grant, which

    def abort_send(self) -> None:
        if self.sends:
            self.vllm.call("abort", self.rng.choice(list(self.sends.values()))[0])

    def abort_generate(self) -> None:
        if self.generates and self.rng.random() < 0.5:
            request_id = self.rng.choice(list(self.generates))
            self.vllm.call("abort", request_id)
            del self.generates[request_id]

    def step(self) -> None:
        self.vllm.step()

    def listen(self) -> None:
        for allocated in self.vllm.notices(Allocated):
            each = self.receivings[allocated.id]
            if each.is_aborted:
                continue
            each.grant = self.vllm.grant_of(each.request_id, allocated, len(self.prompts[each.which]))
        for freed in self.vllm.notices(Freed):
            each = self.receivings.pop(freed.id)
            assert each.word or each.is_aborted
        for sent in self.vllm.notices(Sent):
            _, grant, _ = self.sends.pop(sent.id)
            self.peer.verify(grant)
            self.peer.let_go(grant)
        for failed in self.vllm.notices(SendFailed):
            self.peer.let_go(self.sends.pop(failed.id)[1])
        for request_id in [each for each in self.generates if self.vllm.has_ended(each)]:
            which = self.generates.pop(request_id)
            assert_near(self.vllm.outputs[request_id]["tokens"], self.expected[which])

    def end(self) -> None:
        """As a front that is told to stop."""
        for each in list(self.receivings.values()):
            if not each.is_aborted:
                self.rng.choice([self.abort, self.step])()
        while self.receivings or self.sends or self.generates:
            for each in self.receivings.values():
                if not each.is_aborted and not each.word:
                    each.is_aborted = True
                    self.vllm.call("abort", each.request_id)
                    if each.grant is not None and not each.is_written:
                        self.vllm.table.close(each.grant.grant_id, 0.0)
            self.drop()
            self.step()
            self.listen()


def assert_near(tokens: list[int], alone: dict[str, Any]) -> None:
    """Equal, but where two tokens are so close that vLLM's batches make the difference, and behind that."""
    assert len(tokens) == len(alone["tokens"])
    for token, expected, logprobs in zip(tokens, alone["tokens"], alone["logprobs"], strict=True):
        if token != expected:
            assert token in logprobs and logprobs[expected] - logprobs[token] < CLOSE, (tokens, alone)
            return


@pytest.mark.parametrize("seed", range(4))
def test_disorder(vllm: Hosted, peer: Peer, seed: int) -> None:
    rng = random.Random(seed)
    prompts = [prompt_of(length, seed=100 + length) for length in LENGTHS]
    brought: list[Grant] = []
    expected: list[dict[str, Any]] = []
    for prompt in prompts:
        brought.append(fetch(vllm, peer, prompt))
        expected.append(vllm.generate(prompt, max_tokens=4, logprobs=2))
    vllm.forget()
    disorder = Disorder(vllm, peer, rng, prompts, brought, expected)
    for _ in range(NUM_ACTS):
        disorder.act()
    disorder.end()
