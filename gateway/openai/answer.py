"""What an OpenAI answer has in common for both kinds: ids, usage, and how a streamed chunk is put together.

Owns bytes only. A chunk is a constant prefix, the text as JSON and a constant suffix: a token costs one
``encode`` of a string and no dictionary.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec

from microserve.gateway.api.format import AnswerFormat, Answering, FinishedChoice, UsageCounts
from microserve.gateway.http.sse import DONE, event
from microserve.gateway.openai.common import FLEX
from microserve.gateway.text.answer.transcript import TokenText

encode = msgspec.json.Encoder().encode


def name_of(token: TokenText, *, by_id: bool) -> str:
    """As it stands among log-probabilities."""
    return f"token_id:{token.token_id}" if by_id else token.text


def usage_json(counts: UsageCounts) -> dict[str, Any]:
    details = counts.reasoning_tokens
    return {
        "prompt_tokens": counts.prompt_tokens,
        "completion_tokens": counts.completion_tokens,
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": counts.cached_tokens},
        **({} if details is None else {"completion_tokens_details": {"reasoning_tokens": details}}),
    }


class OpenAIFormat(AnswerFormat):
    """Every chunk of an answer has the same ``id`` and ``created``."""

    id_prefix: ClassVar[str]
    chunk_object: ClassVar[str]
    reply_object: ClassVar[str]
    tells_tier: ClassVar[bool] = False
    """How the request was served, where it has asked for a way."""

    def __init__(self, answering: Answering) -> None:
        self.needs_usage = answering.request.shows_usage
        wish = answering.request.sampling
        self.with_logprobs = wish.logprobs is not None
        self.by_id = answering.request.names_by_id
        self._prompt_logprobs = wish.prompt_logprobs
        self._head: dict[str, Any] = {
            "id": f"{self.id_prefix}-{answering.unique_id}",
            "object": self.chunk_object,
            "created": answering.created,
            "model": answering.model,
            "system_fingerprint": answering.fingerprint,
        }
        tier = answering.request.labels.get("service_tier")
        if self.tells_tier and tier is not None:
            self._head["service_tier"] = FLEX if tier == FLEX else "default"
        opened = encode(self._head)[:-1] + b","
        self._chunk_head = b"data: " + opened + b'"choices":[{"index":'
        self._usage_member = b',"usage":null' if self.needs_usage else b""
        self._chunk_tail = b"}]%b}\n\n" % self._usage_member
        self._usage_head = opened

    def _chunk(self, index: int, rest: bytes) -> bytes:
        """``rest``: members of the choice behind ``index``."""
        return b"%b%d,%b%b" % (self._chunk_head, index, rest, self._chunk_tail)

    def _last_chunk(self, index: int, rest: bytes, promise: str) -> bytes:
        """As :meth:`_chunk`, and in which numerics class the whole choice was made."""
        members = b'%b,"microserve":{"exact":%b}' % (self._usage_member, encode(promise))
        return b"%b%d,%b}]%b}\n\n" % (self._chunk_head, index, rest, members)

    def end(self, counts: UsageCounts | None) -> bytes:
        if counts is None:
            return DONE
        return event(self._usage_head + b'"choices":[],"usage":' + encode(usage_json(counts)) + b"}") + DONE

    def reply(self, choices: Sequence[FinishedChoice], counts: UsageCounts) -> bytes:
        answer = {
            **self._head,
            "object": self.reply_object,
            "choices": [self.choice(choice) for choice in choices],
            "usage": usage_json(counts),
            **self.members(choices),
        }
        return encode(answer)

    def members(self, choices: Sequence[FinishedChoice]) -> dict[str, Any]:
        """Of a reply, beside its choices."""
        return {}

    def prompt_member(self, choice: FinishedChoice) -> dict[str, Any]:
        """vLLM's ``prompt_logprobs``, if they are asked for: of each token of the prompt, by id."""
        scored, num_top = choice.scored, self._prompt_logprobs
        if scored is None or num_top is None:
            return {}
        told = [
            ranked
            and {
                str(token.token_id): {
                    "logprob": token.logprob,
                    "rank": token.rank,
                    "decoded_token": token.text,
                }
                for token in ranked
            }
            for ranked in scored.ranked(num_top)
        ]
        return {"prompt_logprobs": told}

    @abstractmethod
    def choice(self, choice: FinishedChoice) -> dict[str, Any]:
        """One choice of a reply."""
