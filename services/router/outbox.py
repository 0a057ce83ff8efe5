"""What waits to go to one gateway: outputs merged by request, sent inside its credit. Sans-I/O."""

from __future__ import annotations

from dataclasses import dataclass

from microserve.protocol.bus.credit import CreditWindow
from microserve.protocol.messages.engine import TokenLogprob
from microserve.protocol.messages.router import Ended, Output, Stream

MAX_STREAM_TOKENS = 16_384
"""In one message: with 20 log-probabilities each they stay below ``codec.MAX_MESSAGE_NBYTES``."""


@dataclass(slots=True)
class _Waiting:
    offset: int
    token_ids: list[int]
    logprobs: list[TokenLogprob]
    ended: Ended | None


class Outbox:
    """Without credit it merges; it holds no more than the requests' own outputs."""

    def __init__(self) -> None:
        self.window = CreditWindow(0)
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def add(self, output: Output) -> None:
        """Queue behind what waits for the same request; offsets follow each other."""
        waiting = self._waiting.get(output.request_id)
        if waiting is None or waiting.ended is not None:
            self._waiting[output.request_id] = _Waiting(
                output.offset, list(output.token_ids), list(output.logprobs), output.ended
            )
            return
        waiting.token_ids += output.token_ids
        waiting.logprobs += output.logprobs
        waiting.ended = output.ended

    def take(self) -> Stream | None:
        """One message with as much as fits; None when nothing waits or there is no credit."""
        if not self._waiting or not self.window.take():
            return None
        outputs: list[Output] = []
        room = MAX_STREAM_TOKENS
        while self._waiting and room > 0:
            request_id = next(iter(self._waiting))
            waiting = self._waiting[request_id]
            count = len(waiting.token_ids)
            if count > room:
                outputs.append(
                    Output(request_id, waiting.offset, waiting.token_ids[:room], waiting.logprobs[:room])
                )
                waiting.offset += room
                del waiting.token_ids[:room], waiting.logprobs[:room]
                break
            del self._waiting[request_id]
            outputs.append(
                Output(request_id, waiting.offset, waiting.token_ids, waiting.logprobs, waiting.ended)
            )
            room -= count
        return Stream(outputs)
