"""A response's bytes: one JSON object, or the events of its growing.

Owns the members of a response, and the numbers of events. What its items are is ``output.py``'s.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import time
from typing import Any

import msgspec

from microserve.gateway.api.format import AnswerFormat, Answering, Ending, FinishedChoice, UsageCounts
from microserve.gateway.http.errors import Problem
from microserve.gateway.responses.ids import response_id, unique_of
from microserve.gateway.responses.keeping import entry
from microserve.gateway.responses.output import Output, Told
from microserve.gateway.text.answer.choice import Piece

encode = msgspec.json.Encoder().encode


class ResponsesFormat(AnswerFormat):
    needs_usage = True

    def __init__(self, answering: Answering) -> None:
        sampling, echo = answering.sampling, answering.request.echo
        self._context = answering.request.context
        unique = unique_of(answering.unique_id)
        self._output = Output(unique, encrypts=echo["encrypts"])
        self._response: dict[str, Any] = {
            "id": response_id(unique),
            "object": "response",
            "created_at": answering.created,
            "status": "in_progress",
            "completed_at": None,
            "error": None,
            "incomplete_details": None,
            "model": answering.model,
            "output": [],
            "usage": None,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            **echo["response"],
            "store": answering.keeps,
        }
        self._num_events = 0
        self._ending: Ending | None = None

    def opening(self, index: int) -> bytes:
        begun = {"response": self._response}
        return self._events([("response.created", begun), ("response.in_progress", begun)])

    def delta(self, index: int, piece: Piece) -> bytes:
        return self._events(self._output.take(piece))

    def finish(self, index: int, ending: Ending) -> bytes:
        self._ending = ending
        return self._events(self._output.close(is_cut=ending.reason == "length"))

    def end(self, counts: UsageCounts | None) -> bytes:
        assert counts is not None and self._ending is not None
        response = self._concluded(self._ending, counts)
        self._keep(encode(response))
        told = {"response": response, "microserve": {"exact": self._ending.promise}}
        return self._events([(f"response.{response['status']}", told)])

    def failed(self, problem: Problem) -> bytes:
        opening = b"" if self._num_events else self.opening(0)
        code = "server_error" if problem.status >= 500 else problem.code
        if self._output.items:  # what was said stands
            self._output.close(is_cut=True)
        response = self._response | {
            "status": "failed",
            "error": {"code": code, "message": problem.message},
            "output": self._output.items,
            "store": False,
        }
        error = {"code": problem.code, "message": problem.message, "param": problem.param}
        return opening + self._events([("error", error), ("response.failed", {"response": response})])

    def reply(self, choices: Iterable[FinishedChoice], counts: UsageCounts) -> bytes:
        [choice] = choices
        for piece in choice.pieces:
            self._output.take(piece)
        self._output.close(is_cut=choice.ending.reason == "length")
        response = encode(self._concluded(choice.ending, counts))
        self._keep(response)
        return response

    def _keep(self, response: bytes) -> None:
        if self._response["store"]:
            self.kept = (self._response["id"], entry(self._context, response))

    def _concluded(self, ending: Ending, counts: UsageCounts) -> dict[str, Any]:
        is_cut = ending.reason == "length"
        return self._response | {
            "status": "incomplete" if is_cut else "completed",
            "completed_at": None if is_cut else int(time()),
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": self._output.items,
            "usage": _usage(counts),
        }

    def _events(self, told: Iterable[Told]) -> bytes:
        events = []
        for kind, members in told:
            data = encode({"type": kind, "sequence_number": self._num_events, **members})
            events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))
            self._num_events += 1
        return b"".join(events)


def _usage(counts: UsageCounts) -> dict[str, Any]:
    return {
        "input_tokens": counts.prompt_tokens,
        "input_tokens_details": {"cached_tokens": counts.cached_tokens},
        "output_tokens": counts.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": counts.reasoning_tokens or 0},
        "total_tokens": counts.prompt_tokens + counts.completion_tokens,
    }
