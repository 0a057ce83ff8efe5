"""``vllm serve``'s tokens-in, tokens-out endpoint, asked for one request at a time: the front's ``Llm``.

    POST /inference/v1/generate {token_ids, sampling_params, stream} ─> events with token_ids and logprobs

vLLM's sampling parameters are said in vLLM's words (../front/sampling.py); a request is taken away by closing
its connection.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from microserve.protocol.errors import CapacityError, EngineLost, InternalError, InvalidRequest, MeshError
from microserve.protocol.messages.request.sampling import MAX_LOGPROBS
from microserve.services.engine.vllm.front.asyncllm import Stream
from microserve.services.engine.vllm.front.output import Output, Rated
from microserve.services.engine.vllm.front.running import Running
from microserve.services.engine.vllm.serve.http import Answer, NotAnswered, Refused, Server

PATH: Final = "/inference/v1/generate"
BUSY: Final = (429, 503)


class _Rated(msgspec.Struct):
    token_id: int
    logprob: float
    rank: int | None = None


class _Position(_Rated):
    top_logprobs: list[_Rated] = []


class _Logprobs(msgspec.Struct):
    content: list[_Position] | None = None


class _Choice(msgspec.Struct):
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = None
    logprobs: _Logprobs | None = None


class _Event(msgspec.Struct):
    """As far as it is of interest; the rest is other readers'."""

    choices: list[_Choice] = []
    error: Any = None


class Served:
    def __init__(self, server: Server, model: str) -> None:
        """``model``: the name by which the server knows it."""
        self._server = server
        self._model = model
        self.is_dead = False
        """Set by who watches it (core.py)."""

    async def add(self, running: Running) -> Stream:
        body = {
            "request_id": running.request_id,
            "model": self._model,
            "token_ids": running.token_ids,
            "sampling_params": {**running.sampling, "logprobs": _asked(running)},
            "stream": True,
            **({"cache_salt": running.salt} if running.salt else {}),
        }
        try:
            answer = await self._server.ask(PATH, body)
            if answer.status != 200:
                async with answer:
                    await answer.body()
        except NotAnswered as error:
            raise EngineLost(str(error)) from error
        except Refused as refused:
            raise _error_of(refused) from refused
        return _Stream(answer, running.params.logprobs if running.params else None)

    def shutdown(self) -> None:
        """It is not ours to end."""


def _asked(running: Running) -> int | None:
    """Log-probabilities: the server lists the chosen token among them, and one fewer of the others."""
    number = running.params.logprobs if running.params else None
    return min(number + 1, MAX_LOGPROBS) if number else number


def _error_of(refused: Refused) -> MeshError:
    if refused.status in BUSY:
        return CapacityError(refused.detail, retry_after_s=1.0)
    if 400 <= refused.status < 500 and refused.status not in (401, 403, 404):
        return InvalidRequest(refused.detail, field=refused.field)
    return InternalError(f"vllm serve answers {refused.status}: {refused.detail}")


class _Stream:
    def __init__(self, answer: Answer, num_top: int | None) -> None:
        self._answer = answer
        self._num_top = num_top
        self._events: AsyncIterator[bytes] = answer.events()
        self._is_aborted = False

    async def next(self) -> Output:
        while True:
            try:
                event = await anext(self._events)
            except StopAsyncIteration:
                return self._end("it ends in the midst")
            except NotAnswered as error:
                return self._end(str(error))
            if event == b"[DONE]":
                return self._end("it ends without a reason")
            try:
                read = msgspec.json.decode(event, type=_Event)
            except msgspec.DecodeError as error:
                return self._end(f"vllm serve says what is no event: {error}")
            if read.error is not None:
                self._answer.close()
                raise InternalError(f"vllm serve: {read.error}")
            if read.choices:
                return self._taken(read)

    def _taken(self, read: _Event) -> Output:
        choice = read.choices[0]
        rows = choice.logprobs.content if choice.logprobs else None
        if choice.finish_reason:
            self._answer.close()
        return Output(
            choice.token_ids or [],
            None if rows is None else [_row(each, self._num_top or 0) for each in rows],
            finish=choice.finish_reason or "",
            stop=choice.stop_reason,
        )

    def _end(self, why: str) -> Output:
        self._answer.close()
        if self._is_aborted:
            return Output([], finish="abort")
        raise EngineLost(why)

    async def abort(self) -> None:
        self._is_aborted = True
        self._answer.close()


@dataclass(slots=True)
class _Rating:
    logprob: float
    rank: int | None


def _row(position: _Position, num_top: int) -> Mapping[int, Rated]:
    """As the front wants it: the chosen token first, then the likeliest by rank, each once."""
    ranked = [each for each in position.top_logprobs if each.rank is not None and each.rank <= num_top]
    row: dict[int, Rated] = {position.token_id: _Rating(position.logprob, position.rank)}
    for each in sorted(ranked, key=lambda one: one.rank or 0):
        row.setdefault(each.token_id, _Rating(each.logprob, each.rank))
    return row
