"""Responses that are kept: looked at again, with their input, and thrown away."""

from __future__ import annotations

import asyncio
from functools import partial
from urllib.parse import parse_qs

import msgspec

from microserve.gateway.helper.helper import INLINE_BODY_NBYTES
from microserve.gateway.http.errors import NotKept
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.kept.store import Store
from microserve.gateway.responses.keeping import page_of, response_of
from microserve.gateway.state import GatewayState
from microserve.protocol.errors import InvalidRequest

MAX_LISTED = 100
DEFAULT_LISTED = 20


async def response(state: GatewayState, exchange: Exchange) -> None:
    """``GET`` and ``DELETE``."""
    name: str = exchange.path_params["response_id"]
    if exchange.method == "DELETE":
        if not await _store(state, name).delete(exchange.key.owner, name):
            raise _not_kept(name)
        await exchange.reply(200, msgspec.json.encode({"id": name, "object": "response", "deleted": True}))
        return
    if _query(exchange).get("stream", "false") != "false":
        raise InvalidRequest("stream: what is kept is not streamed again", field="stream")
    await exchange.reply(200, response_of(await _found(state, exchange, name)))


async def input_items(state: GatewayState, exchange: Exchange) -> None:
    """``GET``: what a response was made of, the last first unless ``order`` is ``asc``."""
    query = _query(exchange)
    order, after = query.get("order", "desc"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequest("order must be asc or desc", field="order")
    limit = query.get("limit", str(DEFAULT_LISTED))
    if not (limit.isascii() and limit.isdigit() and len(limit) < 4 and 1 <= int(limit) <= MAX_LISTED):
        raise InvalidRequest(f"limit must be between 1 and {MAX_LISTED}", field="limit")
    data = await _found(state, exchange, exchange.path_params["response_id"])
    page = partial(page_of, data, newest_first=order == "desc", after=after, limit=int(limit))
    is_long = len(data) > INLINE_BODY_NBYTES
    await exchange.reply(200, await asyncio.to_thread(page) if is_long else page())


async def _found(state: GatewayState, exchange: Exchange, name: str) -> bytes:
    data = await _store(state, name).get(exchange.key.owner, name)
    if data is None:
        raise _not_kept(name)
    return data


def _store(state: GatewayState, name: str) -> Store:
    if state.store is None:
        raise _not_kept(name)
    return state.store


def _not_kept(name: str) -> NotKept:
    return NotKept(f"no response {name[:128]!r} is kept here", field="response_id")


def _query(exchange: Exchange) -> dict[str, str]:
    """The last value of each."""
    return {name: values[-1] for name, values in parse_qs(exchange.query.decode("latin-1")).items()}
