"""Control tokens that a client has written into a conversation: they are text, never control.

A template writes ``<|im_start|>system`` to say who speaks; the same characters inside a message must not.
Owns finding them in messages and tools, carrying them through a template unseen, and a second tokenizer, made
when it is first needed, in which the vocabulary's control tokens have names that nobody can write: they are
made up for each process. Knows no templates.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

from tokenizers import AddedToken, Tokenizer, models

from microserve.protocol.errors import InvalidRequest

ESCAPES = [chr(code) for code in range(0xFDD0, 0xFDF0)]
"""Code points that are no characters; one that is nowhere in a conversation breaks its control tokens up."""
_MARKER = re.compile(r"[<\[|{].*[>\]|}]", re.DOTALL)
"""What an added token looks like that is not special and marks something all the same: ``<tool_call>``."""
_THOUGHTS = ("<think>", "</think>", "<tool_call>", "</tool_call>")
"""Templates look for these in the assistant's own turns."""


def is_control(token: AddedToken) -> bool:
    return token.special or _MARKER.fullmatch(token.content) is not None


class ControlText:
    """Of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder().values()
        self._tokens = sorted(
            token.content for token in added if is_control(token) and len(token.content) > 1
        )
        self._begins = {token[0] for token in self._tokens}
        self._finder = Tokenizer(models.BPE())
        """Knows nothing else, so these are all that it finds, as the tokenizer itself would."""
        self._finder.add_special_tokens(self._tokens)
        key = secrets.token_hex(8)
        self._names = {token: f"\U000f0000{key}{at}\U000f0001" for at, token in enumerate(self._tokens)}
        self._literal: Tokenizer | None = None
        self._making = Lock()

    def escaped(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        options: Mapping[str, Any],
    ) -> tuple[Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]] | None, Mapping[str, Any], str]:
        """All that a client says to a template, with every control token broken up by the escape, which comes
        last; it is empty, and nothing is changed, if there is none. ``options``: the template's own
        variables. Raises :class:`InvalidRequest` when no escape is left."""
        said = [messages, tools, options]
        if not any(map(self._spans, _texts(said))):
            return messages, tools, options, ""
        whole = "".join(_texts(said))
        escape = next((each for each in ESCAPES if each not in whole), "")
        if not escape:
            raise InvalidRequest("messages have control tokens and every noncharacter", field="messages")

        def broken(text: str) -> str:
            return self._replaced(text, lambda token: token[0] + escape + token[1:])

        def own(text: str) -> str:
            return self._replaced(
                text, lambda token: token if token in _THOUGHTS else token[0] + escape + token[1:]
            )

        changed = [
            _mapped(message, own if message.get("role") == "assistant" else broken) for message in messages
        ]
        return changed, _mapped(tools, broken), _mapped(options, broken), escape

    def _spans(self, text: str) -> list[tuple[int, int]]:
        """Where control tokens begin and end."""
        if not any(begin in text for begin in self._begins):
            return []
        spans: list[tuple[int, int]] = self._finder.encode(text).offsets
        return spans

    def _replaced(self, text: str, change: Callable[[str], str]) -> str:
        parts, at = [], 0
        for begin, end in self._spans(text):
            parts += [text[at:begin], change(text[begin:end])]
            at = end
        return "".join([*parts, text[at:]])

    def encode(self, text: str, escape: str) -> list[int]:
        """Ids of a template's text whose messages were escaped. Slow the first time."""
        text = self._replaced(text, self._names.__getitem__)
        text = text.replace(json.dumps(escape)[1:-1], "").replace(escape, "")
        with self._making:
            if self._literal is None:
                self._literal = self._renamed()
        [encoding] = self._literal.encode_batch_fast([text], add_special_tokens=False)  # without the GIL
        ids: list[int] = encoding.ids
        return ids

    def _renamed(self) -> Tokenizer:
        """The tokenizer with other names for its control tokens."""
        state = json.loads(self._tokenizer.to_str())
        names, model = self._names, state["model"]
        for token in state["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(token, token): at for token, at in vocabulary.items()}
        else:  # Unigram's: tokens with their scores, by id
            model["vocab"] = [[names.get(token, token), score] for token, score in vocabulary]
        if model.get("unk_token") in names:
            model["unk_token"] = names[model["unk_token"]]
        state["post_processor"] = None  # it would only add special tokens, by their old names
        return Tokenizer.from_str(json.dumps(state))


def _texts(value: Any) -> Iterable[str]:
    """All texts in it, names of members too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from value.keys()
        for each in value.values():
            yield from _texts(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _texts(each)


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(name): _mapped(each, change) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_mapped(each, change) for each in value]
    return value
