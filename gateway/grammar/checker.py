"""Grammars that this gateway has checked: asked of its helper once, remembered by content.

Owns the memory, bounded in number and bytes, of verdicts: also of refusals, so that one bomb sent a thousand
times costs one budget.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from microserve.gateway.grammar.asked import Asked
from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.bounds import check_bounds
from microserve.protocol.messages.sampling import MAX_GRAMMAR_NBYTES, Grammar

MAX_KEPT = 512
MAX_KEPT_NBYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Checked:
    """A grammar that engines enforce."""

    grammar: Grammar
    warnings: tuple[str, ...] = ()
    """What was asked for and is not enforced."""


Check = Callable[[Grammar, bool], Awaitable[tuple[str, list[str]]]]
"""Of a grammar, strictly or not: the text that can be enforced, and what was relaxed. Raises
:class:`InvalidRequest`."""


class GrammarChecker:
    """One per gateway process."""

    def __init__(self, ask: Check) -> None:
        self._ask_helper = ask
        self._kept: OrderedDict[tuple[str, str, bool], Checked | str] = OrderedDict()
        """Or why it is refused."""
        self._kept_nbytes = 0

    async def check(self, asked: Asked) -> Checked:
        """Raises :class:`InvalidRequest` naming the field, and in a schema keyword and path."""
        check_asked(asked)
        grammar = asked.grammar
        key = (grammar.kind, grammar.text, asked.is_strict)
        verdict = self._kept.get(key)
        if verdict is None:
            verdict = await self._ask(asked)
            self._keep(key, verdict)
        else:
            self._kept.move_to_end(key)
        if isinstance(verdict, str):
            raise _refused(asked, verdict)
        return verdict

    async def _ask(self, asked: Asked) -> Checked | str:
        try:
            text, warnings = await self._ask_helper(asked.grammar, asked.is_strict)
        except InvalidRequest as error:
            return error.detail
        return Checked(Grammar(kind=asked.grammar.kind, text=text), tuple(warnings))

    def _keep(self, key: tuple[str, str, bool], verdict: Checked | str) -> None:
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
