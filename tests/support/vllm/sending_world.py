"""Sends of a connector between two heaps, step by step, without vLLM."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import msgspec
import numpy as np

from microserve.kvcache.block_pool import BlockPool
from microserve.kvcache.grant.table import GrantTable
from microserve.kvcache.heap.mapped import MappedHeap
from microserve.kvcache.layout import KvLayout
from microserve.protocol.messages.kv.grant import Grant
from microserve.services.engine.vllm.connector.putting import Putting
from microserve.services.engine.vllm.connector.sends import Sends
from microserve.services.engine.vllm.link import Notice, Send
from microserve.services.engine.vllm.link_ends import Front
from tests.support.kvcache.kv_samples import make_layout

SIZE = make_layout().block_size


def layout_of(num_blocks: int) -> KvLayout:
    return msgspec.structs.replace(make_layout(num_blocks=num_blocks), order="somebody's")


@dataclass
class World:
    front: Front
    sender: MappedHeap
    receiver: MappedHeap
    putting: Putting
    pool: BlockPool = field(default_factory=lambda: BlockPool(8))
    heard: list[Notice] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.table = GrantTable(
            *(self.receiver, self.pool), engine_id="e", incarnation=2, lease_s=1.0, verify_checksums=True
        )
        self.sends = Sends(self.heard.append)
        self.source = random.Random(1).sample(range(12), 8)

    def grant(self, end: int) -> Grant:
        blocks = self.pool.allocate(self.receiver.layout.num_blocks_for(end))
        return self.table.open("r", "router", [], 0, blocks, end, now=0.0)

    def send(self, grant: Grant, begin: int = 0, *, send: int = 1, lane: int = 0, first: bool = False) -> str:
        packed = msgspec.msgpack.encode(grant)
        self.sends.add(f"s{send}", Send(send, begin, grant.end, lane, packed, first))
        return f"s{send}"

    def step(self, request_id: str, computed: int, scheduled: int, layers: int = 2) -> None:
        """vLLM computes so many tokens; hooks come for the first ``layers`` layers."""
        part = self.sends.part(request_id, computed, scheduled, self.source)
        self.putting.end(self.sends.take_ended())
        self.putting.begin_step([part] if part is not None else [])
        for layer in range(layers):
            self.putting.put_layer(layer)
        self.putting.end_step()
        assert self.putting.drained() == set(), "its request goes on"

    def hear(self) -> list[Notice]:
        heard = self.heard + self.front.read()
        self.heard.clear()
        return heard


def assert_arrived(world: World, grant: Grant) -> None:
    assert world.table.is_complete(grant.grant_id)
    for layer in range(world.sender.layout.num_layers):
        world.table.verify(grant.grant_id, layer)
        for mine, theirs in zip(world.source, grant.blocks, strict=False):
            nbytes = world.sender.layout.block_nbytes
            start = layer * world.sender.layout.layer_nbytes + mine * nbytes
            there = layer * world.receiver.layout.layer_nbytes + theirs * nbytes
            assert np.array_equal(
                world.sender.read_data(start, nbytes), world.receiver.read_data(there, nbytes)
            )
