"""A grammar as llguidance has it: its text, a matcher whose first masks have been tried, a tokenizer.

Owns how the library is asked, and its limits; what it answers to a grammar that it cannot enforce is passed
on. Costs CPU time and memory: callers are in a process that may be killed, or in a thread of their own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from microserve.protocol.errors import InvalidRequest
from microserve.protocol.grammar.bounds import check_bounds, choices_of, schema_of, schemas_in
from microserve.protocol.messages.request.sampling import Grammar

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

WHITESPACE = r"[ \n]{1,8}"
"""Between the parts of a JSON text: a model that loves blanks writes no more."""
OPTIONS: JsonCompileOptions = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_flexible": True,
    "whitespace_pattern": WHITESPACE,
    "coerce_one_of": False,
    "lenient": False,
}
"""What the library is told of each schema; it is not a client's to choose."""
ANNOTATIONS = (
    "title",
    "description",
    "default",
    "examples",
    "$comment",
    "deprecated",
    "readOnly",
    "writeOnly",
)
MAX_ITEMS_IN_ROW = 8000
"""A thousand properties that may all be left out take half of it."""
LEXER_FUEL = 100_000
MASK_FUEL = 50_000
MASK_ITEMS = 20_000
MAX_LEXER_STATES = 100_000
"""The last three are of one mask, and of a lexer in all: masks are made between the steps of everybody. Up to
10 ms for 49,152 tokens, where the library lets through 145; a thousand optional properties take 4."""
NUM_TRIED = 4
"""Masks that are computed before a grammar counts as compiled."""


def text_of(grammar: Grammar) -> str:
    """What llguidance is given. Raises :class:`InvalidRequest` for what is out of bounds."""
    from llguidance import LLMatcher

    check_bounds(grammar)
    match grammar.kind:
        case "json_object":
            return _of_schema('{"type":"object"}')
        case "json_schema":
            schema = schema_of(grammar.text)
            schema.pop("x-guidance", None)  # the library's own options are not a client's to choose
            return _of_schema(msgspec.json.encode(schema).decode())
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "choice":
            choices = map(json.dumps, choices_of(grammar.text))
            return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
    raise InvalidRequest(f"there is no kind of grammar {grammar.kind!r}", field="grammar")


def _of_schema(schema: str) -> str:
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_json_schema(schema, overrides=OPTIONS)


def json_of(schema: Mapping[str, Any]) -> str:
    """A schema as a term of a grammar in Lark: what its text may be is as everywhere else, and what says
    nothing of that (descriptions) is left out."""
    bare = deepcopy(dict(schema))
    for _, each in schemas_in(bare):
        for name in ANNOTATIONS:
            each.pop(name, None)
    return f"%json {json.dumps({**bare, 'x-guidance': OPTIONS})}"


def load_tokenizer(directory: Path, vocab_size: int | None = None, eos: Collection[int] = ()) -> LLTokenizer:
    """Of a model; half a second. ``vocab_size``: of its logits; ``eos``: none for the tokenizer's own.

    Raises :class:`InvalidRequest` where there is none that can be read."""
    from llguidance import LLTokenizer

    try:
        text = (directory / "tokenizer.json").read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=sorted(eos) or None)
    except (OSError, ValueError) as error:
        raise InvalidRequest(
            f"this model's tokenizer cannot be constrained: {error}", field="grammar"
        ) from None


def compile_grammar(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher at the grammar's begin. Raises :class:`InvalidRequest` with what is wrong with the grammar,
    also where it dies at its first masks."""
    from llguidance import LLMatcher, LLParserLimits

    limits = LLParserLimits(
        max_items_in_row=MAX_ITEMS_IN_ROW,
        initial_lexer_fuel=LEXER_FUEL,
        step_lexer_fuel=MASK_FUEL,
        step_max_items=MASK_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, text_of(grammar), log_level=0, limits=limits)
    _raise_error(matcher)
    for opening in (None, '{"') if grammar.kind.startswith("json") else (None,):
        _try_masks(matcher.deep_copy(), tokenizer, opening)
    return matcher


def _try_masks(trial: LLMatcher, tokenizer: LLTokenizer, opening: str | None) -> None:
    if opening is not None:
        trial.try_consume_tokens(tokenizer.tokenize_str(opening))
    for _ in range(NUM_TRIED):
        mask = trial.compute_bitmask()
        _raise_error(trial)
        token = first_of(mask)
        if token is None:
            raise InvalidRequest("the grammar leaves no token that may be chosen", field="grammar")
        if trial.is_stopped():
            return
        forced = trial.compute_ff_tokens()
        trial.consume_token(forced[0] if forced else token)
        _raise_error(trial)
        if trial.is_stopped():
            return


def first_of(mask: bytes) -> int | None:
    """The lowest id of a mask, where there is one."""
    bits = int.from_bytes(mask, "little")
    return (bits & -bits).bit_length() - 1 if bits else None


def fault_of(matcher: LLMatcher) -> str | None:
    """Why it can go on no more; None while it can."""
    if not matcher.is_error():
        return None
    return " ".join(matcher.get_error().split())[:512]


def _raise_error(matcher: LLMatcher) -> None:
    if (fault := fault_of(matcher)) is not None:
        raise InvalidRequest(fault, field="grammar")
