"""How much work each engine has: what this router put there, and what the engine says of itself.

Sans-I/O. Every number that the router adds belongs to one request's :class:`Account`, which gives all of it
back when it is closed; nothing else can change the book, so nothing can leak (a counter that is only counted
down on the good path stays up for ever after the first cancelled client).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from types import TracebackType

from microserve.protocol.actions import EngineLoad


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """Work on one engine; compares by prefill work first, then by sequences."""

    uncached_tokens: int
    """Prompt tokens in flight that the engine must still compute."""
    sequences: int
    """Requests that run, wait or receive there."""


class LoadBook:
    """Work in flight by engine id."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._sequences: Counter[str] = Counter()
        self._accounts: set[Account] = set()

    @property
    def is_zero(self) -> bool:
        """Nothing is in flight: no account is open and no number is left over."""
        return not self._accounts and not self._tokens and not self._sequences

    def open(self) -> Account:
        """An account for one request; its owner must close it (``with``, or ``finally``)."""
        account = Account(self)
        self._accounts.add(account)
        return account

    def load(self, engine_id: str, reported: EngineLoad) -> Load:
        """The larger of our own book (which knows what is on its way) and the engine's last report
        (which knows of other routers): both count the same work, so they are not added."""
        return Load(
            max(self._tokens[engine_id], reported.queued_prefill_tokens),
            max(self._sequences[engine_id], reported.num_running + reported.num_waiting),
        )

    def check_integrity(self) -> None:
        """The book is the sum of its open accounts."""
        tokens: Counter[str] = Counter()
        sequences: Counter[str] = Counter()
        for account in self._accounts:
            for (engine_id, _), count in account.tokens.items():
                tokens[engine_id] += count
            sequences.update(account.sequences)
        assert +tokens == self._tokens and +sequences == self._sequences, "the book differs from its accounts"

    def _add(self, counter: Counter[str], engine_id: str, amount: int) -> None:
        counter[engine_id] += amount
        if counter[engine_id] == 0:
            del counter[engine_id]


class Account:
    """What one request has in flight; closing it twice is fine, using it afterwards has no effect."""

    def __init__(self, book: LoadBook) -> None:
        self._book = book
        self.tokens: dict[tuple[str, str], int] = {}
        """By engine id and purpose: one engine may prefill and decode for the same request."""
        self.sequences: set[str] = set()
        """Engines on which the request takes a place."""

    def reserve_prefill(self, engine_id: str, purpose: str, num_tokens: int) -> None:
        """``num_tokens`` are to be computed there; replaces an earlier number for the same purpose."""
        if self.is_closed:
            return
        self.release_prefill(engine_id, purpose)
        if num_tokens > 0:
            self.tokens[engine_id, purpose] = num_tokens
            self._book._add(self._book._tokens, engine_id, num_tokens)

    def release_prefill(self, engine_id: str, purpose: str) -> None:
        num_tokens = self.tokens.pop((engine_id, purpose), 0)
        if num_tokens:
            self._book._add(self._book._tokens, engine_id, -num_tokens)

    def reserve_sequence(self, engine_id: str) -> None:
        if not self.is_closed and engine_id not in self.sequences:
            self.sequences.add(engine_id)
            self._book._add(self._book._sequences, engine_id, 1)

    def release_sequence(self, engine_id: str) -> None:
        if engine_id in self.sequences:
            self.sequences.remove(engine_id)
            self._book._add(self._book._sequences, engine_id, -1)

    @property
    def is_closed(self) -> bool:
        return self not in self._book._accounts

    def close(self) -> None:
        for engine_id, purpose in list(self.tokens):
            self.release_prefill(engine_id, purpose)
        for engine_id in list(self.sequences):
            self.release_sequence(engine_id)
        self._book._accounts.discard(self)

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
