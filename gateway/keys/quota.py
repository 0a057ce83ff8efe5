"""What one key may still use, and what it has in hand: requests, tokens, streams and its day's budget.

    enter (head of a request) -> reserve (its prompt is known) -> settle (its end, whatever that was)

Sans-I/O. A refusal is made as early as it can be, so that what is beyond a key's share costs next to nothing:
``enter`` needs no body. ``reserve`` takes the prompt and the longest possible answer, ``settle`` gives back
what was not used. Limits are those of this gateway process; the budget is that of all who share a ledger.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from microserve.gateway.keys.bucket import Bucket
from microserve.gateway.keys.key import ApiKey
from microserve.gateway.keys.usage import Counts, UsageBook, seconds_left_of
from microserve.protocol.errors import CapacityError, InvalidRequest

RETRY_STREAMS_S = 1.0
"""When another stream may have ended: nobody knows."""


class RateLimited(CapacityError):
    """More requests, tokens or streams than the key may have at this moment."""

    code = "rate_limit_exceeded"


class BudgetSpent(CapacityError):
    """The key's tokens of this day are used up."""

    code = "insufficient_quota"


class Quota:
    """One key's limits and what counts against them."""

    def __init__(self, key: ApiKey, book: UsageBook, now: float) -> None:
        self.key = key
        self.num_streams = 0
        self.reserved_tokens = 0
        """Of requests that are being served: they may become used."""
        self._book = book
        self._requests = Bucket(key.requests_per_minute, now)
        self._tokens = Bucket(key.tokens_per_minute, now)

    def reconfigure(self, key: ApiKey, now: float) -> None:
        """Other limits for the same name, from now on."""
        self.key = key
        self._requests.change_limit(key.requests_per_minute, now)
        self._tokens.change_limit(key.tokens_per_minute, now)

    def enter(self, now: float, wall: float) -> Visit:
        """Begin a request, which counts as one and takes one stream. Raises :class:`RateLimited` or
        :class:`BudgetSpent`; a request that is refused has taken nothing.

        ``now``: monotonic, ``wall``: since 1970, both in seconds."""
        key = self.key
        try:
            self._check_streams(1)
            if key.requests_per_minute and (wait_s := self._requests.wait_s(1, now)) > 0:
                raise RateLimited(
                    f"key {key.name!r} may make {key.requests_per_minute} requests a minute",
                    retry_after_s=wait_s,
                )
            self._check_tokens(1, now)
            self._check_budget(wall)
        except CapacityError:
            self._book.add(wall, key.name, Counts(refused=1))
            raise
        if key.requests_per_minute:
            self._requests.take(1, now)
        self.num_streams += 1
        return Visit(self)

    def headers(self, now: float) -> dict[str, str]:
        """OpenAI's ``x-ratelimit-*``, for the limits that there are."""
        found: dict[str, str] = {}
        for kind, bucket in (("requests", self._requests), ("tokens", self._tokens)):
            if bucket.limit:
                found[f"x-ratelimit-limit-{kind}"] = str(bucket.limit)
                found[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(bucket.level(now))))
                found[f"x-ratelimit-reset-{kind}"] = duration_text(bucket.reset_s(now))
        return found

    def _check_streams(self, num_streams: int) -> None:
        limit = self.key.concurrent_streams
        if limit and self.num_streams + num_streams > limit:
            raise RateLimited(
                f"key {self.key.name!r} may have {limit} streams at a time", retry_after_s=RETRY_STREAMS_S
            )

    def _check_tokens(self, num_tokens: int, now: float) -> None:
        limit = self.key.tokens_per_minute
        if limit and (wait_s := self._tokens.wait_s(num_tokens, now)) > 0:
            raise RateLimited(
                f"key {self.key.name!r} may use {limit} tokens a minute; this request may need {num_tokens}, "
                f"of which {max(0, math.floor(self._tokens.level(now)))} are there",
                retry_after_s=wait_s,
            )

    def _check_budget(self, wall: float) -> None:
        budget = self.key.daily_token_budget
        if budget and self._book.tokens_of(wall, self.key.name) + self.reserved_tokens >= budget:
            raise BudgetSpent(
                f"key {self.key.name!r} has used its {budget} tokens of this day (UTC)",
                retry_after_s=seconds_left_of(wall),
            )

    # --- of one request ----------------------------------------------------------------------------

    def _reserve(self, visit: Visit, num_streams: int, num_tokens: int, now: float, wall: float) -> None:
        limit = self.key.concurrent_streams
        if limit and num_streams > limit:
            raise InvalidRequest(f"prompts times n must be at most {limit} for this key", field="n")
        self._check_streams(num_streams - visit.num_streams)
        self._check_tokens(num_tokens, now)
        self._check_budget(wall)
        self.num_streams += num_streams - visit.num_streams
        visit.num_streams = num_streams
        visit.num_tokens = num_tokens
        self.reserved_tokens += num_tokens
        if self.key.tokens_per_minute:
            # More than a whole minute's worth cannot be there: the rest of such a request is owed in the end.
            visit.num_taken = min(num_tokens, self.key.tokens_per_minute)
            self._tokens.take(visit.num_taken, now)

    def _settle(self, visit: Visit, counts: Counts, now: float, wall: float) -> None:
        self.num_streams -= visit.num_streams
        self.reserved_tokens -= visit.num_tokens
        if self.key.tokens_per_minute:
            self._tokens.take(counts.tokens - visit.num_taken, now)
        self._book.add(wall, self.key.name, counts)


class Visit:
    """One request of a key, from ``Quota.enter`` on."""

    def __init__(self, quota: Quota) -> None:
        self.num_streams = 1
        self.num_tokens = 0
        self.num_taken = 0
        """Of the minute's tokens."""
        self._quota = quota
        self._is_settled = False

    @property
    def key(self) -> ApiKey:
        return self._quota.key

    def reserve(self, num_streams: int, num_tokens: int, now: float, wall: float) -> None:
        """Take what the request may need at most; once. Raises :class:`RateLimited`, :class:`BudgetSpent`, or
        :class:`InvalidRequest` for more streams than the key may ever have."""
        try:
            self._quota._reserve(self, num_streams, num_tokens, now, wall)
        except CapacityError:
            self.settle(Counts(refused=1), now, wall)
            raise

    def settle(self, counts: Counts, now: float, wall: float) -> None:
        """The request is over and has used so much; the first call counts."""
        if not self._is_settled:
            self._is_settled = True
            self._quota._settle(self, counts, now, wall)


class Quotas:
    """The quotas of all names that have come, for as long as they are in force or in use."""

    def __init__(
        self, book: UsageBook, *, clock: Callable[[], float], wall_clock: Callable[[], float]
    ) -> None:
        """``clock``: monotonic; ``wall_clock``: since 1970; both in seconds."""
        self.book = book
        self.clock = clock
        self.wall_clock = wall_clock
        self._quotas: dict[str, Quota] = {}

    def of(self, key: ApiKey) -> Quota:
        """What the key's name has."""
        quota = self._quotas.get(key.name)
        if quota is None:
            quota = self._quotas[key.name] = Quota(key, self.book, self.clock())
        elif quota.key is not key:
            quota.reconfigure(key, self.clock())
        return quota

    def enter(self, key: ApiKey) -> Visit:
        """As :meth:`Quota.enter`."""
        return self.of(key).enter(self.clock(), self.wall_clock())

    def reserve(self, visit: Visit, num_streams: int, num_tokens: int) -> None:
        """As :meth:`Visit.reserve`."""
        visit.reserve(num_streams, num_tokens, self.clock(), self.wall_clock())

    def settle(self, visit: Visit, counts: Counts) -> None:
        """As :meth:`Visit.settle`."""
        visit.settle(counts, self.clock(), self.wall_clock())

    def headers(self, key: ApiKey) -> dict[str, str]:
        """As :meth:`Quota.headers`."""
        return self.of(key).headers(self.clock())

    def keep_only(self, keys: Iterable[ApiKey]) -> None:
        """The keys in force are these: others are forgotten as soon as nothing of theirs runs."""
        names = {key.name for key in keys}
        for name in [each for each, quota in self._quotas.items() if each not in names]:
            if not self._quotas[name].num_streams:
                del self._quotas[name]

    def streams(self) -> dict[str, int]:
        """Streams of each name that has any."""
        return {name: quota.num_streams for name, quota in self._quotas.items() if quota.num_streams}


def duration_text(seconds: float) -> str:
    """As in OpenAI's headers: ``120ms``, ``8s``, ``6m0s``, ``1h2m3s``; rounded up."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"
