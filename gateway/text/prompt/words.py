"""Ids of words that came before: most of a prompt is looked up, and only what is new is tokenised.

Owns the memory of words and where a text may be cut. A cut is a space behind anything but white space: the
pre-tokenizers that are known here begin a piece there, whatever stands before or behind it, so the ids of a
text are those of its words, one after the other. Of a tokenizer for which that is not certain there is no
memory. Knows no prompts: a word is remembered, never which text it came in.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Mapping, Sequence
from itertools import dropwhile
from typing import Any

from tokenizers import AddedToken, Tokenizer

MAX_WORDS = 1 << 15
"""Beyond it all are forgotten: a few megabytes."""
MAX_WORD_CHARS = 64
"""A longer one is not remembered."""

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_PATTERNS = frozenset({_LLAMA_3, _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")})
"""Llama 3's and Qwen's. As in GPT-2's (``ByteLevel``), no piece has white space behind anything else."""

_unclear_cut = re.compile(r"\s ").search
"""A space that may belong to what is before it."""


class Words:
    """The memory of one tokenizer."""

    def __init__(self, prefix: list[int], suffix: list[int]) -> None:
        """The special tokens before and behind every text."""
        self._prefix, self._suffix = _packed(prefix), _packed(suffix)
        self._first: dict[str, bytes] = {}
        """Of a text's first word, by itself. Ids are packed: to join bytes takes a third of the time."""
        self._others: dict[str, bytes] = {}
        """Of the words behind it, without the space before them, which counts."""

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Words | None:
        """None where the ids of a text might not be those of its words."""
        if not (
            _state(tokenizer.normalizer).get("type", "NFC") == "NFC"
            and _begins_pieces(_state(tokenizer.pre_tokenizer))
            and _only_adds(_state(tokenizer.post_processor))
            and not any(map(_reaches_out, tokenizer.get_added_tokens_decoder().values()))
        ):
            return None
        special = _special_ids(tokenizer)
        return None if special is None else cls(*special)

    def __len__(self) -> int:
        return len(self._first) + len(self._others)

    def find(self, words: Sequence[str]) -> list[bytes | None]:
        """The packed ids of each word of a text that :func:`split` has cut; None: it is new."""
        found = list(map(self._others.get, words))
        found[0] = self._first.get(words[0])
        return found

    def new(self, words: Sequence[str], found: Sequence[bytes | None]) -> list[str]:
        """The words that :meth:`find` did not, each as it must be tokenised, without special tokens."""
        return [_part(words, at) for at, ids in enumerate(found) if ids is None]

    def joined(
        self,
        words: Sequence[str],
        found: Sequence[bytes | None],
        fresh: Mapping[str, Sequence[int]],
        *,
        add_special_tokens: bool,
    ) -> array[int]:
        """The ids of a text; ``fresh`` has those of its new words."""
        packed = [_packed(fresh[_part(words, at)]) if ids is None else ids for at, ids in enumerate(found)]
        data = b"".join(packed)
        ids = array("I")
        ids.frombytes(self._prefix + data + self._suffix if add_special_tokens else data)
        return ids

    def remember(self, fresh: Mapping[str, Sequence[int]]) -> None:
        """The ids of what was :meth:`new`."""
        if len(self) + len(fresh) > MAX_WORDS:
            self._first.clear()
            self._others.clear()
        for part, ids in fresh.items():
            if len(part) > MAX_WORD_CHARS:
                continue
            if part.startswith(" "):
                self._others[part[1:]] = _packed(ids)
            else:  # no first word begins with a space: that is a cut
                self._first[part] = _packed(ids)


def _packed(ids: Sequence[int]) -> bytes:
    return array("I", ids).tobytes()


def _part(words: Sequence[str], at: int) -> str:
    """With the space before it, which counts; a text's first word has none."""
    return f" {words[at]}" if at else words[0]


def split(text: str) -> list[str]:
    """Cut at every space behind anything but white space; the spaces are left out."""
    words = text.split(" ")
    if _unclear_cut(text) is None:
        return words
    joined = words[:2] if not words[0] else words[:1]  # a text's first space has nothing before it
    for word in words[len(joined) :]:
        last = joined[-1]
        if last and not last[-1].isspace():
            joined.append(word)
        else:
            joined[-1] = f"{last} {word}"
    return joined


def _state(component: Any) -> dict[str, Any]:
    """What a tokenizer.json says of it; empty without one."""
    if component is None:
        return {}
    state: dict[str, Any] = json.loads(component.__getstate__())
    return state


def _begins_pieces(state: Mapping[str, Any]) -> bool:
    """Does a piece begin at every cut?"""
    match state:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return True
        case {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}:
            return pattern in _PATTERNS
        case {"type": "Sequence", "pretokenizers": [*parts]}:
            # Digits are cut out by themselves wherever they stand; what comes after the cuts cuts finer.
            behind = list(dropwhile(lambda part: part["type"] == "Digits", parts))
            return bool(behind) and _begins_pieces(behind[0]) and all(map(_only_cuts, behind[1:]))
    return False


def _only_cuts(state: Mapping[str, Any]) -> bool:
    """Takes a piece as it is, without a space before it."""
    return state["type"] in ("Split", "Digits") or (
        state["type"] == "ByteLevel" and not state["add_prefix_space"]
    )


def _reaches_out(token: AddedToken) -> bool:
    """Does it matter what stands beside it, or is it itself cut?"""
    return token.lstrip or token.rstrip or token.single_word or re.search(r"\s", token.content) is not None


def _only_adds(state: Mapping[str, Any]) -> bool:
    """Nothing but special tokens, before and behind."""
    if state.get("type") == "Sequence":
        return all(map(_only_adds, state["processors"]))
    if state.get("type") == "TemplateProcessing":
        return len([part for part in state["single"] if "Sequence" in part]) == 1
    return str(state.get("type", "ByteLevel")) == "ByteLevel"


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]] | None:
    """What stands before and behind every text; None if that cannot be told."""
    plain, full = tokenizer.encode("a", add_special_tokens=False).ids, tokenizer.encode("a").ids
    for begin in range(len(full)):
        end = begin + len(plain)
        if plain and full[begin:end] == plain:
            return full[:begin], full[end:]
    return None
