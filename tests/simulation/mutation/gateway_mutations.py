"""Bugs planted in gateway/routers: what the simulation would not see if it had a gateway of its own."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import msgspec

from microserve.gateway.routers.failover import Moves
from microserve.gateway.routers.link import RouterLink
from microserve.protocol.messages.router import Generate, StreamCredit
from tests.simulation.mutation.planting import mutation, replace


@mutation
def _moved_one_token_short(stack: ExitStack) -> None:
    """A moved request says that one token fewer was delivered than was."""
    send = RouterLink.send

    def send_short(self: RouterLink, message: Any, *bulk: bytes) -> bool:
        if isinstance(message, Generate) and message.num_output_tokens:
            message = msgspec.structs.replace(message, num_output_tokens=message.num_output_tokens - 1)
        return send(self, message, *bulk)

    replace(stack, RouterLink, "send", send_short)


@mutation
def _moved_from_the_beginning(stack: ExitStack) -> None:
    """A moved request begins anew, and the client has its first tokens twice."""
    send = RouterLink.send

    def send_anew(self: RouterLink, message: Any, *bulk: bytes) -> bool:
        if isinstance(message, Generate) and message.num_output_tokens:
            bulk = (bulk[0][: -4 * message.num_output_tokens],)
            message = msgspec.structs.replace(message, num_output_tokens=0)
        return send(self, message, *bulk)

    replace(stack, RouterLink, "send", send_anew)


@mutation
def _gateway_keeps_its_credit(stack: ExitStack) -> None:
    """A gateway gives a router no credit back."""
    send = RouterLink.send

    def send_no_credit(self: RouterLink, message: Any, *bulk: bytes) -> bool:
        return isinstance(message, StreamCredit) or send(self, message, *bulk)

    replace(stack, RouterLink, "send", send_no_credit)


@mutation
def _lost_and_kept(stack: ExitStack) -> None:
    """A lost router's requests stay with it, though they go on elsewhere."""
    lose = RouterLink.lose

    def lose_nothing(self: RouterLink, reason: str) -> None:
        mailboxes = dict(self.mailboxes)
        lose(self, reason)
        self.mailboxes.update(mailboxes)

    replace(stack, RouterLink, "lose", lose_nothing)


@mutation
def _lost_and_forgotten(stack: ExitStack) -> None:
    """A request whose router is lost, when no other is there, is never sent again."""
    replace(stack, Moves, "place", lambda self: None)
