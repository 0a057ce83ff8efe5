"""The model's tokenizer: text <-> ids, and the chat prompt.

Owns ``tokenizer.json`` and its neighbours in the model's directory, and the threads that encode long texts
(``encode`` holds the GIL; the batch calls release it). Which words came before is ``prompt/words.py``'s.
Knows no requests.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from microserve.gateway.text.detokenizer import Detokenizer
from microserve.gateway.text.options import TextOptions
from microserve.gateway.text.prompt.chat_template import ChatTemplate, read_json, special_tokens
from microserve.gateway.text.prompt.continued import Continued
from microserve.gateway.text.prompt.control import ControlText
from microserve.gateway.text.prompt.words import Words, split
from microserve.gateway.text.vocabulary import Vocabulary
from microserve.protocol.errors import ConfigError, InvalidRequest, PromptTooLong

INLINE_CHARS = 2048
"""Longer texts are encoded in a thread: half a millisecond is all that the loop may lose."""
LOOKED_UP_CHARS = 8192
"""Of texts that are looked up word by word, which takes a fifth of the time."""

TAIL_TOKENS = 256
"""Of a prompt, that are looked at for what the template has begun of the answer."""

NUM_THREADS = 2
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its pool of threads wakes for one new word, too

Maps = Sequence[Mapping[str, Any]]
Renderer = Callable[[Maps, Maps | None, Mapping[str, Any] | None], Awaitable[str]]
"""Messages, tools and the template's own variables -> the prompt's text, by the model's chat template."""


class ModelTokenizer:
    """Everything that the gateway knows of a model."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        renderer: Renderer | None = None,
        *,
        template: ChatTemplate | None = None,
        parse_control_tokens: bool = False,
    ) -> None:
        """``renderer``: None for a model without a chat template. ``template``: what it is made of.
        ``parse_control_tokens``: those that stand in messages are no text."""
        # A tokenizer.json may ask for truncation and padding: both would change prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._renderer = renderer
        self._threads = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="tokenize")
        vocabulary = tokenizer.get_vocab(with_added_tokens=True)
        self._longest_token_chars = max(map(len, vocabulary), default=1)
        self.vocabulary = Vocabulary(tokenizer)
        """As answers are without a word to the contrary."""
        self._shown: dict[TextOptions, Vocabulary] = {}
        self._words = Words.of(tokenizer)
        self.description: dict[str, Any] = {}
        """As clients may be told: its class, its special tokens by their names, the chat template."""
        self._added = tokenizer.get_added_tokens_decoder().keys()
        self.template = template
        self._control = None if parse_control_tokens else ControlText(tokenizer)

    @classmethod
    def load(
        cls, directory: str | Path, *, renderer: Renderer | None = None, parse_control_tokens: bool = False
    ) -> ModelTokenizer:
        """``renderer`` runs the model's template, if it has one; None: it is run here.

        Raises :class:`ConfigError` (field ``model.path``) naming what is missing or broken.
        """
        root = Path(directory)
        if not str(directory):
            raise ConfigError(
                "model.path is not set: the directory with the model's tokenizer.json", field="model.path"
            )
        file = root / "tokenizer.json"
        if not file.is_file():
            raise ConfigError(f"no tokenizer.json in {root}", field="model.path")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ConfigError(f"{file}: {error}", field="model.path") from None
        template = ChatTemplate.of_model(root)
        renderer = None if template is None else renderer or _run_here(template)
        made = cls(tokenizer, renderer, template=template, parse_control_tokens=parse_control_tokens)
        config = read_json(root / "tokenizer_config.json")
        name = config.get("tokenizer_class")
        made.description = {
            "tokenizer_class": name if isinstance(name, str) else "PreTrainedTokenizerFast",
            "chat_template": None if template is None else template.source,
            **special_tokens(read_json(root / "special_tokens_map.json") | config),
        }
        return made

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    async def encode(
        self, texts: Sequence[str], *, add_special_tokens: bool, max_tokens: int, field: str = "prompt"
    ) -> list[Sequence[int]]:
        """Ids of each text. Long texts are encoded in a thread, so that streams go on, and so are many words
        that are new.

        Raises :class:`PromptTooLong`, before any work, for a text that could not be ``max_tokens`` long even
        if each of its tokens were the vocabulary's longest.
        """
        for text in texts:
            self._check_length(text, max_tokens, field)
        if self._words is None or sum(map(len, texts)) > LOOKED_UP_CHARS:
            return await self._encode_all(texts, add_special_tokens)
        return await self._look_up(self._words, list(map(split, texts)), add_special_tokens)

    def _check_length(self, text: str, max_tokens: int, field: str) -> None:
        if len(text) > max_tokens * self._longest_token_chars:
            raise PromptTooLong(
                f"the maximum context length is {max_tokens} tokens, too few for {len(text)} characters",
                field=field,
            )

    async def _look_up(
        self, known: Words, texts: Sequence[Sequence[str]], add_special_tokens: bool
    ) -> list[Sequence[int]]:
        """Ids of texts that are cut into words."""
        found = list(map(known.find, texts))
        new = list(dict.fromkeys(chain.from_iterable(map(known.new, texts, found))))
        fresh: dict[str, Sequence[int]] = {}
        if new:
            fresh = dict(zip(new, await self._encode_all(new, False), strict=True))
            known.remember(fresh)
        return [
            known.joined(words, ids, fresh, add_special_tokens=add_special_tokens)
            for words, ids in zip(texts, found, strict=True)
        ]

    async def _encode_all(self, texts: Sequence[str], add_special_tokens: bool) -> list[Sequence[int]]:
        if sum(map(len, texts)) <= INLINE_CHARS:
            return self._encode(texts, add_special_tokens)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._encode, texts, add_special_tokens)

    def _encode(self, texts: Sequence[str], add_special_tokens: bool) -> list[Sequence[int]]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [encoding.ids for encoding in encodings]

    async def encode_chat(
        self,
        messages: Maps,
        tools: Maps | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        max_tokens: int,
        continues: bool = False,
    ) -> Sequence[int]:
        """Ids of a conversation, ready for the assistant's answer. ``tools`` and ``options`` are for the
        template; control tokens in all three are text. ``continues``: the answer goes on with the last
        message.

        Raises :class:`InvalidRequest` (field ``messages``) without a template or if it refuses them.
        """
        if self._renderer is None:
            raise InvalidRequest("the model has no chat template; use /v1/completions", field="messages")
        escape = ""
        if self._control is not None:
            messages, tools, options, escape = self._control.escaped(messages, tools, options or {})
        if continues:
            continued = Continued(messages)
            options = {**(options or {}), "add_generation_prompt": False}
            text = continued.cut(await self._renderer(continued.messages, tools, options))
        else:
            text = await self._renderer(messages, tools, options)
        if escape and self._control is not None:
            self._check_length(text, max_tokens, "messages")
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._threads, self._control.encode, text, escape)
        # The template has written the special tokens itself.
        [ids] = await self.encode([text], add_special_tokens=False, max_tokens=max_tokens, field="messages")
        return ids

    def added_id(self, text: str) -> int | None:
        """Of a token that is this text wherever it stands; None if there is no such."""
        token_id = self._tokenizer.token_to_id(text)
        return token_id if token_id in self._added else None

    def ids_of(self, text: str) -> tuple[int, ...]:
        """Of a short text that has markers."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def tail(self, token_ids: Sequence[int], marks: Mapping[int, str], *, all_of_it: bool = False) -> str:
        """The text of the last tokens, some of which are ``marks``."""
        begin = 0 if all_of_it else max(len(token_ids) - TAIL_TOKENS, 0)
        tail = token_ids[begin:]
        detokenizer = self.detokenizer(token_ids[:begin])
        return "".join(
            marks[token_id] if token_id in marks else detokenizer.step(token_id)[1] for token_id in tail
        )

    def names(self, token_ids: Sequence[int]) -> list[str]:
        """As the vocabulary has them; empty for an id that is none."""
        return [self._tokenizer.id_to_token(token_id) or "" for token_id in token_ids]

    def decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(token_ids), skip_special_tokens=True)

    def vocabulary_for(self, options: TextOptions) -> Vocabulary:
        """Of the few ways in which special tokens may be shown, each made once."""
        way = TextOptions(options.skip_special_tokens, options.spaces_between_special_tokens)
        if way.skip_special_tokens:
            return self.vocabulary
        if way not in self._shown:
            self._shown[way] = Vocabulary(self._tokenizer, way)
        return self._shown[way]

    def detokenizer(self, prompt_ids: Sequence[int], vocabulary: Vocabulary | None = None) -> Detokenizer:
        return Detokenizer(vocabulary or self.vocabulary, prompt_ids)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


def _run_here(template: ChatTemplate) -> Renderer:
    async def render(messages: Maps, tools: Maps | None, options: Mapping[str, Any] | None) -> str:
        return template.render(messages, tools, options)

    return render
