"""Prompts of given lengths that share the prefixes that they should share, and no others. Pure.

A prompt is a row of parts; equal seeds make equal parts, others differ within their first tokens. A part is a
slice of one long row of words (or token ids) behind a few that spell its seed, so that making one costs next
to nothing while a load runs.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

import msgspec

from microserve.services.command.bench.task import CHAT, COMPLETIONS, Load, Words

NUM_SPELT = 5
"""Words that spell a seed."""
NUM_ROW = 1 << 14

_COMMON = """
time year people way day man thing woman life child world school state family student group country
problem hand part place case week company system program question work government number night point
home water room mother area money story fact month lot right study book eye job word business issue side
kind head house service friend father power hour game line end member law car city community name
president team minute idea kid body information back parent face others level office door health person
art war history party result change morning reason research girl guy moment air teacher force education
foot boy age policy music market sense nation plan college interest death experience effect use class
control field development role effort rate heart drug show leader light voice wife police mind price
report decision son view relationship town road arm difference value building action season society tax
director position player record paper space ground form event official matter center couple site project
activity star table need court oil situation cost industry figure street image phone data picture
practice piece land product doctor wall patient worker news test movie north love support technology
"""
WORDS = tuple(_COMMON.split())
"""Common ones, which are one token each in most vocabularies."""

Part = tuple[str, int]
"""Seed and tokens."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One request."""

    number: int
    at_s: float | None
    """From the beginning; None: as soon as may be."""
    max_tokens: int
    parts: tuple[Part, ...] = ()
    given: Any = None
    """Instead of parts: a text, or messages."""


class Writer:
    """Makes bodies."""

    def __init__(self, load: Load, words: Words) -> None:
        self._load = load
        self._has_ids = bool(words.ids) and load.endpoint == COMPLETIONS
        """A chat takes text only."""
        self._tokens_per_word = 1.0 if self._has_ids else words.tokens_per_word
        chance = random.Random("row")
        self._alphabet: list[Any] = list(words.ids if self._has_ids else WORDS)
        self._row = chance.choices(self._alphabet, k=NUM_ROW)

    def expected_input(self, planned: Planned) -> int | None:
        """Tokens that the server must count; None where only it knows."""
        if not self._has_ids or planned.given is not None:
            return None
        return sum(num_tokens for _, num_tokens in planned.parts)

    def body(self, planned: Planned) -> bytes:
        load = self._load
        body: dict[str, Any] = {"model": load.model, "max_tokens": planned.max_tokens, "stream": True}
        body["stream_options"] = {"include_usage": True}
        body["temperature"] = load.temperature
        if load.ignore_eos:
            body["ignore_eos"] = True
        prompt = planned.given if planned.given is not None else self.prompt(planned.parts)
        if load.endpoint != CHAT:
            body["prompt"] = prompt
        elif isinstance(prompt, list):
            body["messages"] = prompt
        else:
            body["messages"] = [{"role": "user", "content": prompt}]
        return msgspec.json.encode(body)

    def prompt(self, parts: tuple[Part, ...]) -> str | list[int]:
        """Ids for completions, if there are any; else a text of about as many tokens."""
        written: list[Any] = []
        for seed, num_tokens in parts:
            written += self._part(seed, max(1, round(num_tokens / self._tokens_per_word)))
        return written if self._has_ids else " ".join(written)

    def _part(self, seed: str, count: int) -> list[Any]:
        spelt = int.from_bytes(hashlib.blake2b(seed.encode(), digest_size=8).digest(), "big")
        begin, left, beginning = spelt % NUM_ROW, spelt // NUM_ROW, []
        for _ in range(min(count, NUM_SPELT)):
            left, digit = divmod(left, len(self._alphabet))
            beginning.append(self._alphabet[digit])
        rest: list[Any] = []
        count -= len(beginning)
        while count > len(rest):
            rest += self._row[begin : begin + count - len(rest)]
            begin = 0
        return beginning + rest
