"""Grammars that this gateway has checked: asked of its helper once, remembered by content.

Owns the memory, bounded in number and bytes, of verdicts: also of refusals, so that one bomb sent a thousand
times costs one budget.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from microserve.gateway.grammar.asked import Asked
from microserve.protocol.errors import InvalidRequest, QueueFull
from microserve.protocol.grammar.bounds import check_bounds
from microserve.protocol.messages.request.sampling import MAX_GRAMMAR_NBYTES, Grammar

MAX_KEPT = 512
MAX_KEPT_NBYTES = 8 << 20
MAX_ASKED = 256
"""Grammars that are checked or wait for that, one after the other."""


@dataclass(frozen=True, slots=True)
class Checked:
    """A grammar that engines enforce."""

    grammar: Grammar
    warnings: tuple[str, ...] = ()
    """What was asked for and is not enforced."""


_Key = tuple[str, str, bool]
Check = Callable[[Grammar, bool, Callable[[], bool] | None], Awaitable[tuple[str, list[str]] | None]]
"""Of a grammar, strictly or not: the text that can be enforced, and what was relaxed; None when its turn came
and the function said that nobody wanted it any more. Raises :class:`InvalidRequest`."""


class _Turn:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.num_users = 0
        """Who holds it or waits for it."""


class GrammarChecker:
    """One per gateway process."""

    def __init__(self, ask: Check) -> None:
        self._ask_helper = ask
        self._kept: OrderedDict[_Key, Checked | str] = OrderedDict()
        """Or why it is refused."""
        self._kept_nbytes = 0
        self._turns: dict[_Key, _Turn] = {}
        """Of what is asked now: others who want the same wait for the verdict."""

    async def check(self, asked: Asked, is_wanted: Callable[[], bool] | None = None) -> Checked | None:
        """Raises :class:`InvalidRequest` naming the field, and in a schema keyword and path, and
        :class:`QueueFull`; None when its turn came and nobody wanted it any more."""
        check_asked(asked)
        grammar = asked.grammar
        key = (grammar.kind, grammar.text, asked.is_strict)
        verdict = self._known(key)
        if verdict is None:
            verdict = await self._verdict(key, asked, is_wanted)
        if isinstance(verdict, str):
            raise _refused(asked, verdict)
        return verdict

    def _known(self, key: _Key) -> Checked | str | None:
        verdict = self._kept.get(key)
        if verdict is not None:
            self._kept.move_to_end(key)
        return verdict

    async def _verdict(
        self, key: _Key, asked: Asked, is_wanted: Callable[[], bool] | None
    ) -> Checked | str | None:
        turn = self._turns.get(key)
        if turn is None:
            if len(self._turns) >= MAX_ASKED:
                raise QueueFull(f"{MAX_ASKED} grammars wait to be checked", retry_after_s=1.0)
            turn = self._turns[key] = _Turn()
        turn.num_users += 1
        try:
            async with turn.lock:
                verdict = self._known(key)
                if verdict is None:
                    verdict = await self._ask(asked, is_wanted)
                    if verdict is not None:
                        self._keep(key, verdict)
                return verdict
        finally:
            turn.num_users -= 1
            if not turn.num_users:  # a lock that is free may have somebody who is about to take it
                del self._turns[key]

    async def _ask(self, asked: Asked, is_wanted: Callable[[], bool] | None) -> Checked | str | None:
        try:
            answer = await self._ask_helper(asked.grammar, asked.is_strict, is_wanted)
        except InvalidRequest as error:
            return error.detail
        if answer is None:
            return None
        text, warnings = answer
        return Checked(Grammar(kind=asked.grammar.kind, text=text), tuple(warnings))

    def _keep(self, key: _Key, verdict: Checked | str) -> None:
        if key in self._kept:
            return
        self._kept[key] = verdict
        self._kept_nbytes += 2 * len(key[1])
        while len(self._kept) > MAX_KEPT or self._kept_nbytes > MAX_KEPT_NBYTES:
            (_, text, _), _ = self._kept.popitem(last=False)
            self._kept_nbytes -= 2 * len(text)


def check_asked(asked: Asked) -> None:
    """Raises :class:`InvalidRequest` for what is refused before anything is compiled."""
    try:
        if len(asked.grammar.text) > MAX_GRAMMAR_NBYTES:
            raise InvalidRequest(f"a grammar may have {MAX_GRAMMAR_NBYTES} bytes at most")
        check_bounds(asked.grammar)
    except InvalidRequest as error:
        raise _refused(asked, error.detail) from None


def _refused(asked: Asked, detail: str) -> InvalidRequest:
    return InvalidRequest(f"{asked.field}: {detail}", field=asked.field)
