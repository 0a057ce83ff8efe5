"""How an answer looks: the events of a stream, or a whole message, with why it ended and what it took.

Owns the frame around the blocks (``blocks.py``). An answer has one choice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from microserve.gateway.anthropic.blocks import BlockStream, encode, sse, whole_blocks
from microserve.gateway.api.format import AnswerFormat, Answering, Ending, FinishedChoice, UsageCounts
from microserve.gateway.http.errors import Problem
from microserve.gateway.parsing.events import CallBegun, Event, Said
from microserve.gateway.text.answer.choice import Piece

PING = sse("ping", {})


class MessageFormat(AnswerFormat):
    needs_usage = True

    def __init__(self, answering: Answering) -> None:
        self._answering = answering
        self._shows_thoughts = not answering.request.hides_thoughts
        self._blocks = BlockStream(shows_thoughts=self._shows_thoughts)
        self._has_begun = self._has_calls = False
        self._ending: Ending | None = None
        self._head: dict[str, Any] = {
            "id": f"msg_{answering.unique_id}",
            "type": "message",
            "role": "assistant",
            "model": answering.model,
        }

    def opening(self, index: int) -> bytes:
        """What of the prompt comes out of the cache is known at the end, which says so."""
        if self._has_begun:
            return b""
        self._has_begun = True
        begun = UsageCounts(self._answering.num_prompt_tokens, 0, 0)
        message = {**self._head, "content": [], **_stop(None, None), "usage": _usage(begun)}
        return sse("message_start", {"message": message})

    def delta(self, index: int, piece: Piece) -> bytes:
        if not piece.events:
            return self._blocks.say(piece.text) if piece.text else b""
        self._has_calls = self._has_calls or any(isinstance(each, CallBegun) for each in piece.events)
        return self._blocks.push(piece.events)

    def finish(self, index: int, ending: Ending) -> bytes:
        self._ending = ending
        return self._blocks.close()

    def end(self, counts: UsageCounts | None) -> bytes:
        assert counts is not None and self._ending is not None
        ending = self._ending
        delta = _stop(self._reason(ending, has_calls=self._has_calls), ending.stop)
        told = {"delta": delta, "usage": _usage(counts), "microserve": {"exact": ending.promise}}
        return sse("message_delta", told) + sse("message_stop", {})

    def failed(self, problem: Problem) -> bytes:
        return b"event: error\ndata: %b\n\n" % problem.envelope()

    def ping(self) -> bytes:
        """Nothing comes before the message has begun."""
        return self.opening(0) + PING

    def reply(self, choices: Iterable[FinishedChoice], counts: UsageCounts) -> bytes:
        [choice] = choices
        events: list[Event] = [Said("content", choice.text)] if choice.events is None else choice.events
        reason = self._reason(choice.ending, has_calls=any(isinstance(each, CallBegun) for each in events))
        message = {
            **self._head,
            "content": whole_blocks(events, shows_thoughts=self._shows_thoughts),
            **_stop(reason, choice.ending.stop),
            "usage": _usage(counts),
        }
        return encode(message)

    def _reason(self, ending: Ending, *, has_calls: bool) -> str:
        if ending.reason == "length":
            asked = self._answering.request.sampling.max_tokens
            is_own = asked is None or self._answering.sampling.max_tokens == asked
            return "max_tokens" if is_own else "model_context_window_exceeded"
        if ending.stop is not None:
            return "stop_sequence"
        return "tool_use" if has_calls else "end_turn"


def _stop(reason: str | None, sequence: str | None) -> dict[str, Any]:
    return {"stop_reason": reason, "stop_sequence": sequence}


def _usage(counts: UsageCounts) -> dict[str, Any]:
    """As Anthropic counts: what came out of the cache is no part of ``input_tokens``."""
    details = counts.reasoning_tokens
    return {
        "input_tokens": counts.prompt_tokens - counts.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": counts.cached_tokens,
        "output_tokens": counts.completion_tokens,
        **({} if details is None else {"output_tokens_details": {"thinking_tokens": details}}),
    }
