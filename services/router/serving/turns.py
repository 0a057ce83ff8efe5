"""Whose request begins next: tenants share the mesh, and what one of them has too much of waits here, not in
the engines, where it would stand in the way of the others.

Sans-I/O. A request begins when its tenant is due, and

- there is a place for it. While another tenant is about, whoever has its share of the places leaves an eighth
  of them free, so that the others need not wait for an end;
- its tenant has little enough before the engines that is not computed yet. That bounds what a request of
  somebody else finds ahead of it, whatever the first one has sent;
- while another tenant is about, its tenant has used less lately than its share, or than what the others leave
  but for the headroom.

Due is, of those with the highest priority, the tenant that has been served least: tokens in and out, as in
VTC (Sheng et al., arXiv 2401.00588). One that comes back does not make up for the time that it was away.
Requests without a tenant never wait.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, field
from typing import NamedTuple

from microserve.protocol.errors import InternalError

ABOUT_S = 10.0
"""A tenant is about for so long after it had a request."""
REMEMBER_S = 600.0
"""So long one that is not is kept in mind."""
USE_S = 1.0
"""Time constant of what a tenant has used lately."""
RESERVE = 8
"""One place of so many stays free for those who have less than their share."""
ALONE = 16
"""So many times as much may stand before the engines while nobody else is about."""


class Room(NamedTuple):
    """What the mesh can take at this moment."""

    num_engines: int
    num_places: float
    """Sequences that may run, those of all tenants together."""
    num_tokens: float
    """Prompt tokens that one tenant may have before the engines, not computed yet."""
    tokens_per_s: float
    """Prompt tokens that the engines can compute; infinite: not known."""


@dataclass(slots=True)
class _Tenant:
    served: float
    seen_at: float
    waiting: list[tuple[int, int, str]] = field(default_factory=list)
    """A heap: minus the priority, the number, the request."""
    running: set[str] = field(default_factory=set)
    used_tokens: float = 0.0
    """Begun lately: each fades with :data:`USE_S`, as of :attr:`used_at`."""
    used_at: float = 0.0
    prefilling: dict[str, int] = field(default_factory=dict)
    """Of the running, those without a token so far: prompt tokens that some engine must compute."""

    @property
    def is_active(self) -> bool:
        return bool(self.waiting or self.running)

    def use(self, now: float, num_tokens: int = 0) -> float:
        """Prompt tokens a second, lately; ``num_tokens`` more begin now."""
        self.used_tokens *= math.exp(min(0.0, self.used_at - now) / USE_S)
        self.used_at = max(self.used_at, now)
        self.used_tokens += num_tokens
        return self.used_tokens / USE_S


@dataclass(slots=True)
class _Entry:
    tenant: _Tenant
    num_tokens: int


class Turns:
    """Every request of a tenant, from ``enter`` to ``leave``; ``now`` is monotonic, seconds."""

    def __init__(self, headroom: float) -> None:
        """``headroom``: of what the engines can compute, so much stays idle while several tenants are about,
        rather than being given to one that has had its share: whoever comes finds a step of somebody else
        under way less often."""
        self._headroom = headroom
        self._tenants: dict[str, _Tenant] = {}
        self._entries: dict[str, _Entry] = {}
        self._numbers = itertools.count()
        self._num_running = 0
        self._tidied_at = float("-inf")

    @property
    def num_waiting(self) -> int:
        return len(self._entries) - self._num_running

    @property
    def is_idle(self) -> bool:
        """Nobody waits or runs."""
        return not self._entries

    def num_requests(self, tenant: str) -> int:
        """Of this tenant, waiting or running."""
        found = self._tenants.get(tenant)
        return len(found.waiting) + len(found.running) if found is not None else 0

    def tokens_ahead(self, tenant: str) -> float:
        """Prompt tokens that are computed before those of its next request, as far as it is by turns: its own
        that wait, and as many of each other tenant that has some."""
        own = self._tokens_waiting(tenant)
        return own + sum(min(own, self._tokens_waiting(name)) for name in self._tenants if name != tenant)

    def _tokens_waiting(self, tenant: str) -> int:
        found = self._tenants.get(tenant)
        if found is None:
            return 0
        return sum(self._entries[request_id].num_tokens for _, _, request_id in found.waiting)

    def enter(self, request_id: str, tenant: str, priority: int, num_tokens: int, now: float) -> None:
        """A request waits for its turn; of its prompt, ``num_tokens`` must be computed."""
        self._tidy(now)
        found = self._tenants.get(tenant)
        if found is None:
            found = self._tenants[tenant] = _Tenant(0.0, now)
        if not found.is_active:
            others = [each.served for each in self._tenants.values() if each.is_active]
            found.served = max(found.served, min(others, default=0.0))
        found.seen_at = now
        self._entries[request_id] = _Entry(found, num_tokens)
        heapq.heappush(found.waiting, (-priority, next(self._numbers), request_id))

    def begin(self, room: Room, now: float) -> list[str]:
        """The requests whose turn it is, in order."""
        begun: list[str] = []
        tenants = self._tenants.values()
        num_about = sum(each.is_active or now - each.seen_at <= ABOUT_S for each in tenants)
        while True:
            due = [each for each in tenants if each.waiting and self._may(each, room, num_about, now)]
            if not due:
                return begun
            tenant = min(due, key=lambda each: (each.waiting[0][0], each.served, each.waiting[0][1]))
            _, _, request_id = heapq.heappop(tenant.waiting)
            num_tokens = self._entries[request_id].num_tokens
            tenant.running.add(request_id)
            tenant.prefilling[request_id] = num_tokens
            tenant.served += num_tokens
            tenant.use(now, num_tokens)
            self._num_running += 1
            begun.append(request_id)

    def _may(self, tenant: _Tenant, room: Room, num_about: int, now: float) -> bool:
        num_places, factor = room.num_places, ALONE
        if num_about > 1:
            factor = 1
            if len(tenant.running) >= num_places / num_about:
                num_places -= max(1.0, num_places / RESERVE)
            others = sum(each.use(now) for each in self._tenants.values() if each is not tenant)
            share = max(room.tokens_per_s / num_about, room.tokens_per_s * (1.0 - self._headroom) - others)
            if tenant.use(now) > share:
                return False
        if self._num_running >= max(1.0, num_places):
            return False
        if len(tenant.prefilling) < factor * room.num_engines:
            return True
        return sum(tenant.prefilling.values()) < factor * room.num_tokens

    def computed(self, request_id: str) -> None:
        """Its first token is there; later calls have no effect."""
        entry = self._entries.get(request_id)
        if entry is not None:
            entry.tenant.prefilling.pop(request_id, None)

    def leave(self, request_id: str, num_output_tokens: int = 0) -> None:
        """It is over, running or not; unknown ones are fine."""
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return
        tenant = entry.tenant
        tenant.prefilling.pop(request_id, None)
        if request_id in tenant.running:
            tenant.running.remove(request_id)
            tenant.served += num_output_tokens
            self._num_running -= 1
        else:
            tenant.waiting = [each for each in tenant.waiting if each[2] != request_id]
            heapq.heapify(tenant.waiting)

    def _tidy(self, now: float) -> None:
        if now - self._tidied_at < REMEMBER_S / 10:
            return
        self._tidied_at = now
        for name, tenant in list(self._tenants.items()):
            if not tenant.is_active and now - tenant.seen_at > REMEMBER_S:
                del self._tenants[name]

    def check_integrity(self) -> None:
        """Every request is in one place. Raises :class:`InternalError`."""
        found = [request_id for each in self._tenants.values() for _, _, request_id in each.waiting]
        running = [request_id for each in self._tenants.values() for request_id in each.running]
        prefilling = {request_id for each in self._tenants.values() for request_id in each.prefilling}
        if sorted([*found, *running]) != sorted(self._entries) or len(running) != self._num_running:
            raise InternalError("requests wait or run that have not entered, or the other way round")
        if not prefilling <= set(running):
            raise InternalError("a prompt is computed before its turn")
