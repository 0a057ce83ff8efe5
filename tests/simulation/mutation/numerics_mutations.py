"""Bugs planted where numerics classes are kept apart: a promise that is not true must be seen to be none."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import msgspec

from microserve.gateway.routers.link import RouterLink
from microserve.protocol.messages.numerics import UNKNOWN, Numerics
from microserve.protocol.messages.router import Generate
from microserve.services.engine.core.memory import KvMemory
from microserve.services.engine.core.request.received import ReceivedGrant
from microserve.services.engine.core.request.sequence import Sequence
from microserve.services.router.authoring.action.grant import GrantHandle
from microserve.services.router.serving.live import LiveRequest
from tests.simulation.mutation.planting import mutation, replace


@mutation
def _another_class_is_cached(stack: ExitStack) -> None:
    """What an exact engine computes behind KV of another class becomes prefix cache."""
    insert = KvMemory.insert

    def insert_all(self: KvMemory, sequence: Sequence) -> None:
        known, sequence.has_foreign_kv = sequence.has_foreign_kv, False
        insert(self, sequence)
        sequence.has_foreign_kv = known

    replace(stack, KvMemory, "insert", insert_all)


@mutation
def _another_class_is_committed(stack: ExitStack) -> None:
    """A commit makes KV of another class prefix cache of an exact engine."""
    commit = KvMemory.commit

    def commit_all(self: KvMemory, received: ReceivedGrant, blocks: list[int]) -> int:
        received.is_foreign = False
        return commit(self, received, blocks)

    replace(stack, KvMemory, "commit", commit_all)


@mutation
def _the_first_class_is_the_whole(stack: ExitStack) -> None:
    """A stream that goes on in another class is told to be of the one in which it began."""
    made_in = LiveRequest.made_in

    def made_at_first(self: LiveRequest, numerics: Numerics) -> Numerics | None:
        return made_in(self, self.numerics or numerics)

    replace(stack, LiveRequest, "made_in", made_at_first)


@mutation
def _the_sender_does_not_count(stack: ExitStack) -> None:
    """An answer is told to be of its decode engine's class, whoever has prefilled it."""
    replace(stack, GrantHandle, "numerics", property(lambda self: None))


@mutation
def _the_next_router_is_not_told(stack: ExitStack) -> None:
    """A request that goes on at another router does not say in which class it began."""
    send = RouterLink.send

    def send_without(self: RouterLink, message: Any, *bulk: bytes) -> bool:
        if isinstance(message, Generate) and message.num_output_tokens:
            message = msgspec.structs.replace(message, numerics=UNKNOWN)
        return send(self, message, *bulk)

    replace(stack, RouterLink, "send", send_without)
