"""What vLLM says of a request, in our words.

``Output`` is one ``RequestOutput`` of vLLM's with one completion, taken apart in asyncllm.py; what is made of
it here is pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.request.prompt_logprobs import (
    FIRST_POSITION,
    PromptLogprob,
    PromptLogprobs,
    packed,
)


class Rated(Protocol):
    """vLLM's ``Logprob``."""

    logprob: float
    rank: int | None


@dataclass(frozen=True, slots=True)
class Output:
    """New tokens of a request since its last output."""

    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, Rated]] | None = None
    """A mapping for each token, if asked for: the chosen one first, then the likeliest."""
    prompt_logprobs: Sequence[Mapping[int, Rated] | None] | None = None
    cached_tokens: int = 0
    """Of the prompt, found in the prefix cache."""
    finish: str = ""
    """vLLM's ``finish_reason``; empty while it goes on."""
    stop: int | str | None = None


def token_logprobs(
    token_ids: Sequence[int], rows: Sequence[Mapping[int, Rated]] | None, num_top: int | None
) -> list[TokenLogprob]:
    """One for each token, or none where none were asked for (``num_top`` None)."""
    if num_top is None or not rows:
        return []
    rated = []
    for token_id, row in zip(token_ids, rows, strict=True):
        chosen, top = _split(token_id, row, num_top)
        rated.append(TokenLogprob(chosen.logprob, top))
    return rated


def prompt_rows(
    prompt: Sequence[int], rows: Sequence[Mapping[int, Rated] | None], num_top: int
) -> PromptLogprobs:
    """All of a prompt's; position 0 has none."""
    made = []
    for token_id, row in zip(prompt[FIRST_POSITION:], rows[FIRST_POSITION:], strict=True):
        chosen, top = _split(token_id, row or {}, num_top)
        made.append(PromptLogprob(chosen.logprob, max(1, chosen.rank or 1), tuple(top)))
    return packed(FIRST_POSITION, num_top, made)


def _split(token_id: int, row: Mapping[int, Rated], num_top: int) -> tuple[Rated, list[tuple[int, float]]]:
    """The chosen token's, and the likeliest ones, likeliest first.

    vLLM's row has the chosen token first and then the likeliest in order, but each token only once: if the
    chosen one is among the likeliest, its rank says where."""
    chosen = row[token_id]
    top = [(each, rated.logprob) for each, rated in row.items() if each != token_id]
    if len(row) <= num_top:
        top.insert((chosen.rank or 1) - 1, (token_id, chosen.logprob))
    return chosen, top


def finish_of(output: Output) -> tuple[str, int | None]:
    """Reason and stop token of WIRE.md 4.3."""
    if output.finish != "stop":
        return ("length" if output.finish == "length" else output.finish or "error"), None
    if isinstance(output.stop, int):
        return "stop", output.stop
    return "stop", output.token_ids[-1] if output.token_ids else None
