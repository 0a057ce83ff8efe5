"""A probe: one thing that people do with the ``openai`` package, and its right outcome.

Owns what a probe is and the list that the modules of this room fill. A probe runs against a served gateway
whose engine says given tokens: what is probed is the shape of things, not the sense of a model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import openai
from tokenizers import Tokenizer

from tests.support.gateway.gateway_world import Served
from tests.support.gateway.living import Living

SAYS = "Hello \N{GRINNING FACE}!"
KEY = "a-key"
USER: list[Any] = [{"role": "user", "content": "hi"}]


@dataclass(frozen=True)
class Bench:
    """What a probe has to work with."""

    client: openai.OpenAI
    """With a key, and without retries."""
    living: Living
    tokenizer: Tokenizer
    fails: list[str] = field(default_factory=list)
    """Codes with which the router refuses the next requests, one each."""

    def chat(self, **fields: Any) -> Any:
        """One conversation; ``fields``: what is asked beside it."""
        return self.client.chat.completions.create(**{"model": "tiny", "messages": USER, **fields})

    def complete(self, **fields: Any) -> Any:
        return self.client.completions.create(**{"model": "tiny", "prompt": "once", **fields})

    def asked(self) -> Served:
        """What came to the router last."""
        return self.living.served()[-1]

    def prompt(self) -> str:
        """The last prompt as text, control tokens and all."""
        text: str = self.tokenizer.decode(self.asked().tokens, skip_special_tokens=False)
        return text


@dataclass(frozen=True)
class Probe:
    what: str
    """In the words of docs/api.md."""
    run: Callable[[Bench], None]
    says: str
    """By the engine."""
    refused: tuple[int, str | None] | None
    """The status that OpenAI's own refusal has, and the field that it names; None: it is served."""
    room: str

    @property
    def outcome(self) -> str:
        if self.refused is None:
            return "served"
        status, param = self.refused
        return f"{status}, names `{param}`" if param else str(status)


PROBES: list[Probe] = []


def probe(
    what: str, *, says: str = SAYS, refused: int | None = None, param: str | None = None
) -> Callable[[Callable[[Bench], None]], Callable[[Bench], None]]:
    """``refused``: the status with which ``run`` must fail, as OpenAI's client raises it."""

    def listed(run: Callable[[Bench], None]) -> Callable[[Bench], None]:
        room = run.__module__.rpartition(".")[2]
        PROBES.append(Probe(what, run, says, None if refused is None else (refused, param), room))
        return run

    return listed
