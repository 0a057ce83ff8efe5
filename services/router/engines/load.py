"""How much work each engine has: what this router put there, and what the engine says of itself.

Sans-I/O. Every number that the router adds belongs to one request's :class:`Account`, which gives all of it
back when it is closed; nothing else can change the book, so nothing can leak (a counter that is only counted
down on the good path stays up for ever after the first cancelled client).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType

from microserve.protocol.messages.engine import EngineLoad, Sent
from microserve.protocol.smoothing import smoothed

READS_ONLY = ("Load.", "LoadBook.own", "LoadBook.load", "Links.goodput", "Links.transfer_s")
"""Where a strategy that hangs may be broken off (../oversight/cut.py)."""


@dataclass(frozen=True, slots=True, order=True)
class Load:
    """Work on one engine; compares by prefill work first, then by sequences, and by nothing else."""

    uncached_tokens: int
    """Prompt tokens in flight that the engine must still compute."""
    sequences: int
    """Requests that run, wait or receive there."""
    running: int = field(default=0, compare=False)
    """Sequences in its batch, by its last report; the others of ``sequences`` wait or receive."""
    free_blocks: int = field(default=0, compare=False)
    """Blocks that nobody uses, by its last report; some of them hold prefixes."""
    prefill_tokens_per_s: float = field(default=0.0, compare=False)
    """Measured by the engine; 0: not yet."""
    decode_step_s: float = field(default=0.0, compare=False)
    """Measured by the engine; 0: not yet."""
    transfer_tokens: int = field(default=0, compare=False)
    """Tokens whose KV is to be sent from there or to there, in sends of this router that are not done."""


UNPLACED = ""
"""Stands for an engine where none has been chosen."""


class LoadBook:
    """Work in flight by engine id."""

    def __init__(self) -> None:
        self._tokens: Counter[str] = Counter()
        self._sequences: Counter[str] = Counter()
        self._transfers: Counter[str] = Counter()
        self._requests: Counter[str] = Counter()
        """Accounts with anything on the engine."""
        self._accounts: set[Account] = set()
        self._prompts: dict[tuple[str, int], Account] = {}
        """The request that computes a prompt on an engine, where several have the same prompt."""
        self.unplaced_tokens = 0
        """Prompt tokens of requests whose strategy has not yet said where they are computed."""
        self.links = Links()
        self._last: dict[str, tuple[tuple[int, int, int], EngineLoad, Load]] = {}
        """By engine id, what :meth:`load` said last and of what: a pick asks several times over."""

    @property
    def is_zero(self) -> bool:
        """Nothing is in flight: no account is open and no number is left over."""
        left = self._tokens or self._sequences or self._requests or self._prompts or self.unplaced_tokens
        return not (self._accounts or self._transfers or left)

    def open(self, num_tokens: int = 0, prompt: int | None = None) -> Account:
        """An account for one request; its owner must close it (``with``, or ``finally``).

        ``num_tokens`` are to be computed, it is not yet known where: they count as unplaced until the first
        prefill is reserved. ``prompt`` tells equal prompts: those that an engine has at one time (the choices
        of one ``n``) count once there, since the cache serves all but the first.
        """
        account = Account(self, prompt)
        self._accounts.add(account)
        account.unplaced_tokens = num_tokens if self._lead(account, UNPLACED) else 0
        self.unplaced_tokens += account.unplaced_tokens
        return account

    def shares(self, engine_id: str, prompt: int) -> bool:
        """Is an equal prompt about to be computed there, or not yet placed?"""
        return (engine_id, prompt) in self._prompts or (UNPLACED, prompt) in self._prompts

    def own(self, engine_id: str) -> Load:
        """What this router put there; a request that only sends from there counts as a sequence too."""
        return Load(self._tokens[engine_id], self._requests[engine_id])

    def columns(self, engine_ids: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
        """Of our own, for each engine: prompt tokens and places that are taken there, and tokens that are on
        their way from there or to there."""
        tokens, sequences, transfers = self._tokens, self._sequences, self._transfers
        return (
            [tokens[engine_id] for engine_id in engine_ids] if tokens else [0] * len(engine_ids),
            [sequences[engine_id] for engine_id in engine_ids] if sequences else [0] * len(engine_ids),
            [transfers[engine_id] for engine_id in engine_ids] if transfers else [0] * len(engine_ids),
        )

    def load(self, engine_id: str, reported: EngineLoad) -> Load:
        """The larger of our own book (which knows what is on its way) and the engine's last report
        (which knows of other routers): both count the same work, so they are not added."""
        own = self._tokens[engine_id], self._sequences[engine_id], self._transfers[engine_id]
        last = self._last.get(engine_id)
        if last is not None and last[1] is reported and last[0] == own:
            return last[2]
        tokens, sequences, transfers = own
        load = Load(
            max(tokens, reported.queued_prefill_tokens),
            max(sequences, reported.num_running + reported.num_waiting),
            reported.num_running,
            reported.free_blocks,
            reported.prefill_tokens_per_s,
            reported.decode_step_s,
            transfers,
        )
        self._last[engine_id] = (own, reported, load)
        return load

    def forget(self, engine_id: str) -> None:
        """That engine has ended: what was measured of it. What is in flight there its accounts give back."""
        self.links.forget(engine_id)
        self._last.pop(engine_id, None)

    def check_integrity(self) -> None:
        """The book is the sum of its open accounts."""
        tokens: Counter[str] = Counter()
        sequences: Counter[str] = Counter()
        requests: Counter[str] = Counter()
        transfers: Counter[str] = Counter()
        for account in self._accounts:
            for (engine_id, _), count in account.tokens.items():
                tokens[engine_id] += count
            sequences.update(account.sequences)
            for source, target, count in account.transfers.values():
                transfers.update({source: count, target: count})
            requests.update({*account.sequences, *(engine_id for engine_id, _ in account.tokens)})
        assert +tokens == self._tokens and +sequences == self._sequences, "the book differs from its accounts"
        assert +requests == self._requests, "the book counts other requests than its accounts"
        assert +transfers == self._transfers, "the book counts other sends than its accounts"
        assert self.unplaced_tokens == sum(account.unplaced_tokens for account in self._accounts)
        assert self._accounts.issuperset(self._prompts.values()), "a closed account computes a prompt"

    def _lead(self, account: Account, engine_id: str) -> bool:
        """Is it this account that computes its prompt there? The first that asks is."""
        if account.prompt is None:
            return True
        return self._prompts.setdefault((engine_id, account.prompt), account) is account

    def _unlead(self, account: Account, engine_id: str) -> None:
        """It computes its prompt there no more."""
        if account.prompt is not None and self._prompts.get((engine_id, account.prompt)) is account:
            del self._prompts[engine_id, account.prompt]

    def _add(self, counter: Counter[str], engine_id: str, amount: int) -> None:
        counter[engine_id] += amount
        if counter[engine_id] == 0:
            del counter[engine_id]


class Account:
    """What one request has in flight; closing it twice is fine, using it afterwards has no effect."""

    def __init__(self, book: LoadBook, prompt: int | None) -> None:
        self._book = book
        self.prompt = prompt
        self.unplaced_tokens = 0
        self.tokens: dict[tuple[str, str], int] = {}
        """By engine id and purpose: one engine may prefill and decode for the same request."""
        self.sequences: set[str] = set()
        """Engines on which the request takes a place."""
        self.transfers: dict[str, tuple[str, str, int]] = {}
        """Source, target and tokens of each send that is not done, by name."""

    def reserve_prefill(self, engine_id: str, purpose: str, num_tokens: int) -> None:
        """``num_tokens`` are to be computed there; replaces an earlier number for the same purpose."""
        if self.is_closed:
            return
        self._place()
        self.release_prefill(engine_id, purpose)
        if num_tokens > 0 and self._book._lead(self, engine_id):
            self._enter(engine_id)
            self.tokens[engine_id, purpose] = num_tokens
            self._book._add(self._book._tokens, engine_id, num_tokens)

    def release_prefill(self, engine_id: str, purpose: str) -> None:
        num_tokens = self.tokens.pop((engine_id, purpose), 0)
        if num_tokens:
            self._book._add(self._book._tokens, engine_id, -num_tokens)
            self._leave(engine_id)
            if not any(there == engine_id for there, _ in self.tokens):
                self._book._unlead(self, engine_id)

    def reserve_sequence(self, engine_id: str) -> None:
        if not self.is_closed and engine_id not in self.sequences:
            self._enter(engine_id)
            self.sequences.add(engine_id)
            self._book._add(self._book._sequences, engine_id, 1)

    def release_sequence(self, engine_id: str) -> None:
        if engine_id in self.sequences:
            self.sequences.remove(engine_id)
            self._book._add(self._book._sequences, engine_id, -1)
            self._leave(engine_id)

    def begin_transfer(self, name: str, source: str, target: str, num_tokens: int) -> None:
        """KV of ``num_tokens`` > 0 is to be sent; ``name`` is new."""
        if self.is_closed:
            return
        self.transfers[name] = (source, target, num_tokens)
        for engine_id in {source, target}:
            self._book._add(self._book._transfers, engine_id, num_tokens)

    def end_transfer(self, name: str, sent: Sent | None = None) -> None:
        """It is done, or has failed; what its sender measured is kept for later requests."""
        source, target, num_tokens = self.transfers.pop(name, ("", "", 0))
        if not num_tokens:
            return
        for engine_id in {source, target}:
            self._book._add(self._book._transfers, engine_id, -num_tokens)
        if sent is not None:
            self._book.links.measure(source, target, sent)

    def _place(self) -> None:
        self._book.unplaced_tokens -= self.unplaced_tokens
        self.unplaced_tokens = 0
        self._book._unlead(self, UNPLACED)

    def _uses(self, engine_id: str) -> bool:
        return engine_id in self.sequences or any(there == engine_id for there, _ in self.tokens)

    def _enter(self, engine_id: str) -> None:
        """Before its first entry there."""
        if not self._uses(engine_id):
            self._book._add(self._book._requests, engine_id, 1)

    def _leave(self, engine_id: str) -> None:
        """After its last one."""
        if not self._uses(engine_id):
            self._book._add(self._book._requests, engine_id, -1)

    @property
    def is_closed(self) -> bool:
        return self not in self._book._accounts

    def close(self) -> None:
        for engine_id, purpose in list(self.tokens):
            self.release_prefill(engine_id, purpose)
        for engine_id in list(self.sequences):
            self.release_sequence(engine_id)
        for name in list(self.transfers):
            self.end_transfer(name)
        self._place()
        self._book._accounts.discard(self)

    def __enter__(self) -> Account:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(slots=True)
class _Link:
    """Means of bytes and of seconds: their ratio lets large sends count for more than small ones, whose time
    is mostly the fixed cost of a put."""

    nbytes: float
    seconds: float


class Links:
    """Measured goodput by (source, target); an engine that ended is forgotten, its next life may stand
    elsewhere."""

    def __init__(self) -> None:
        self.kv_nbytes_per_token = 0.0
        """Bytes of one token's KV, all layers, from the sends so far; 0: none yet."""
        self._links: dict[tuple[str, str], _Link] = {}

    def measure(self, source: str, target: str, sent: Sent) -> None:
        """Take in what a sender says of a send that is complete."""
        seconds = sent.timings.transfer_s
        if sent.nbytes <= 0 or sent.sent <= 0:
            return
        self.kv_nbytes_per_token = smoothed(self.kv_nbytes_per_token, sent.nbytes / sent.sent)
        if not 0.0 < seconds < math.inf:  # too short for the sender's clock, or no number
            return
        link = self._links.setdefault((source, target), _Link(sent.nbytes, seconds))
        link.nbytes = smoothed(link.nbytes, sent.nbytes)
        link.seconds = smoothed(link.seconds, seconds)

    def measured(self) -> list[tuple[str, str]]:
        """Source and target."""
        return [*self._links]

    def goodput(self, source: str, target: str) -> float:
        """Bytes a second while a put runs; 0 where nothing has been measured."""
        link = self._links.get((source, target))
        return link.nbytes / link.seconds if link is not None else 0.0

    def transfer_s(self, source: str, target: str, num_tokens: int) -> float:
        """Seconds that a put of ``num_tokens`` takes; 0 where the link has not been measured."""
        goodput = self.goodput(source, target)
        return num_tokens * self.kv_nbytes_per_token / goodput if goodput else 0.0

    def forget(self, engine_id: str) -> None:
        for pair in [pair for pair in self._links if engine_id in pair]:
            del self._links[pair]
