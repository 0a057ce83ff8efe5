"""One answer over HTTP, shown while it comes. Owns when to wait, and that Ctrl-C ends the answer alone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import msgspec

from microserve.services.command.chat.answer import STOPPED, Answer, Piece
from microserve.services.command.client.chunk import error_in
from microserve.services.command.client.http import Client
from microserve.services.command.client.sse import EventReader, EventTooLong

PATH = "/v1/chat/completions"
SERVED_BY = "x-microserve-"

Show = Callable[[Piece], None]


class _Listener:
    """Puts what comes where it is waited for."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self.fault = ""

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, headers

    def body(self, data: bytes) -> None:
        self.queue.put_nowait(data)

    def end(self, fault: str) -> None:
        self.fault = fault
        self.queue.put_nowait(None)


async def answer_to(client: Client, body: dict[str, Any], strategy: str, show: Show) -> Answer:
    """Raises nothing for what a server or Ctrl-C does: that is the answer's ``fault``."""
    listener, answer = _Listener(), Answer()
    headers = {f"{SERVED_BY}strategy": strategy} if strategy else {}
    request = client.endpoint.request("POST", PATH, msgspec.json.encode(body), headers)
    began_s = time.monotonic()
    exchange = asyncio.create_task(client.exchange(request, listener))
    try:
        await _read(listener, answer, show, began_s)
        fault = listener.fault
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None:
            task.uncancel()
        fault = STOPPED
    except EventTooLong as error:
        fault = str(error)
    finally:
        exchange.cancel()
        with suppress(asyncio.CancelledError):
            await exchange
    answer.total_s = time.monotonic() - began_s
    if not answer.was_refused:
        answer.end(fault)
    return answer


async def _read(listener: _Listener, answer: Answer, show: Show, began_s: float) -> None:
    reader, refusal = EventReader(), b""
    while (data := await listener.queue.get()) is not None:
        if listener.status != 200:
            refusal += data
            continue
        for event in reader.push(data):
            for piece in answer.push(event):
                answer.first_s = answer.first_s or time.monotonic() - began_s
                show(piece)
    answer.served_by = {
        name.removeprefix(SERVED_BY): value
        for name, value in listener.headers.items()
        if name.startswith(SERVED_BY)
    }
    if listener.status not in (0, 200):
        answer.was_refused = True
        answer.fault = error_in(refusal) or f"the server answered {listener.status}"
