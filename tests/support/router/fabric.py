"""The one-sided writes of scripted engines, as their receivers would see them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from microserve.protocol.messages.kv.grant import Grant


@dataclass
class Fabric:
    """The one-sided writes of all scripted engines: which tokens have come into which grant."""

    covered: dict[str, set[int]] = field(default_factory=dict)
    first_tokens: dict[str, int] = field(default_factory=dict)
    lanes: dict[str, set[int]] = field(default_factory=dict)
    changed: list[Callable[[], None]] = field(default_factory=list)

    def put(self, grant: Grant, begin: int, end: int, lane: int, first_token: int | None) -> None:
        assert lane not in self.lanes.setdefault(grant.grant_id, set()), "a lane was used twice"
        self.lanes[grant.grant_id].add(lane)
        have = self.covered.setdefault(grant.grant_id, set())
        assert not have & set(range(begin, end)), "two senders wrote the same tokens"
        have.update(range(begin, end))
        if first_token is not None:
            self.first_tokens[grant.grant_id] = first_token
        for callback in self.changed:
            callback()
