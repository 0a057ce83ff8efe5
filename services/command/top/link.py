"""A gateway's ``/view`` by HTTP: one answer, or the feed, which is come back to where it broke.

Owns the connection and what is said where there is none. Does not know what is shown.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import TypeVar

import msgspec

from microserve.gateway.view.forms import HealthForm, MeshForm, RequestsForm
from microserve.services.command.client.chunk import error_in
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.client.http import Client
from microserve.services.command.client.sse import EventReader, EventTooLong
from microserve.services.command.top.picture import Picture

RETRY_S = 1.0
SILENCE_S = 10.0
"""A feed says something twice a second."""
ANSWER_S = 10.0
MAX_ERROR_NBYTES = 1 << 16

T = TypeVar("T")


class Unseen(Exception):
    """Nothing can be seen; the text says why, and what to do."""


class Link:
    """Make it in the running loop, and ``close`` it."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._client = Client(endpoint)

    async def close(self) -> None:
        await self._client.close()

    async def get(self, path: str, form: type[T]) -> T:
        """What stands under ``/view/``. Raises :class:`Unseen`."""
        try:
            async with asyncio.timeout(ANSWER_S):
                status, body = await self._client.fetch("GET", f"/view/{path}")
        except TimeoutError:
            raise Unseen(f"{self.endpoint.url} does not answer within {ANSWER_S:g} s") from None
        except ConnectionError as error:
            raise Unseen(no_gateway(str(error))) from None
        if status != 200:
            raise Unseen(refusal(self.endpoint, status, body))
        try:
            return msgspec.json.decode(body, type=form)
        except msgspec.MsgspecError as error:
            raise Unseen(f"{self.endpoint.url}/view/{path} is not what this version reads: {error}") from None

    async def look(self, picture: Picture, clock: Callable[[], float]) -> None:
        """All of it once. Raises :class:`Unseen`."""
        health = await self.get("health", HealthForm)
        mesh = await self.get("mesh", MeshForm)
        requests = await self.get("requests?limit=1000", RequestsForm)
        picture.look(mesh, requests, health, clock())

    async def follow(self, on_event: Callable[[bytes], None], on_lost: Callable[[str], None]) -> None:
        """Until cancelled: each event's data, and why there are none now. ``on_event`` may raise
        :class:`msgspec.MsgspecError`."""
        reader = EventReader()
        while True:
            feed = _Feed(reader, on_event)
            headers = {"accept": "text/event-stream"}
            if reader.last_id:
                headers["last-event-id"] = reader.last_id.decode("latin-1")
            asked = asyncio.ensure_future(
                self._client.exchange(self.endpoint.request("GET", "/view/feed", headers=headers), feed)
            )
            try:
                while not asked.done() and not feed.problem:
                    feed.is_heard = False
                    await asyncio.wait([asked], timeout=SILENCE_S)
                    if not asked.done() and not feed.is_heard:
                        feed.problem = f"{self.endpoint.url} says nothing"
            finally:
                asked.cancel()
                await asyncio.wait([asked])
            if feed.status not in (0, 200):
                on_lost(refusal(self.endpoint, feed.status, bytes(feed.refused)))
            else:
                on_lost(feed.problem or "the feed has ended")
            reader = _after(reader)
            await asyncio.sleep(RETRY_S)


def _after(reader: EventReader) -> EventReader:
    """What was half said is said again."""
    fresh = EventReader()
    fresh.last_id = reader.last_id
    return fresh


class _Feed:
    def __init__(self, reader: EventReader, on_event: Callable[[bytes], None]) -> None:
        self._reader, self._on_event = reader, on_event
        self.status, self.refused, self.problem = 0, bytearray(), ""
        self.is_heard = False

    def head(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.is_heard = status, True

    def body(self, data: bytes) -> None:
        self.is_heard = True
        if self.status != 200:
            self.refused += data[: MAX_ERROR_NBYTES - len(self.refused)]
        elif not self.problem:
            try:
                for event in self._reader.push(data):
                    self._on_event(event)
            except (msgspec.MsgspecError, EventTooLong) as error:
                self.problem = f"the feed is not what this version reads: {error}"
                self._reader.last_id = b""

    def end(self, fault: str) -> None:
        self.problem = self.problem or fault


def no_gateway(reason: str) -> str:
    return (
        f"no gateway: {reason}\n"
        "`microserve up` starts a mesh here; --url http://HOST:PORT or --directory DIR names one that runs"
    )


def refusal(endpoint: Endpoint, status: int, body: bytes) -> str:
    """A sentence that says what is missing."""
    said = error_in(body)
    if status == 401:
        what = "does not know this key" if endpoint.api_key else "asks for an API key"
        return (
            f"{endpoint.url} {what}: {said}\n"
            "--api-key KEY is an operator's key; `microserve key new NAME --operator` makes one"
        )
    if status == 403:
        return (
            f"{endpoint.url}: {said}\n"
            "the view is for operators: --api-key with a key of `microserve key new NAME --operator`, or of "
            "gateway.api_keys (`microserve key list` shows which are)"
        )
    if status == 404:
        return (
            f"{endpoint.url} has no such view: is it a gateway of this version? `microserve doctor` ({said})"
        )
    return f"{endpoint.url} answers {status}: {said}"
