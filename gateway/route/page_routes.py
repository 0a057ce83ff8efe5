"""The page's files, at ``/`` and under ``/page/``: read once, the same for everybody, without a key."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

from microserve.gateway.http.errors import PathNotFound
from microserve.gateway.http.exchange import Exchange
from microserve.gateway.state import GatewayState

FOLDER = Path(__file__).parents[1] / "page"
KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}
HEADERS = {
    "content-security-policy": "default-src 'self'; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
"""``no-cache``: kept, and asked about (by ``etag``) each time, so that a new gateway has its new page."""


class PageFile(NamedTuple):
    kind: bytes
    etag: str
    body: bytes


@cache
def files() -> Mapping[str, PageFile]:
    """By the name behind ``/page/``; what is no part of a page (licences, sums) is not served."""
    return {
        path.relative_to(FOLDER).as_posix(): PageFile(
            KINDS[path.suffix], f'"{hashlib.sha256(body).hexdigest()[:32]}"', body
        )
        for path in sorted(FOLDER.rglob("*"))
        if path.suffix in KINDS
        for body in [path.read_bytes()]
    }


async def index(state: GatewayState, exchange: Exchange) -> None:
    await _reply(exchange, files()["index.html"])


async def file(state: GatewayState, exchange: Exchange) -> None:
    found = files().get(exchange.path_params["name"])
    if found is None:
        raise PathNotFound(f"the page has no {exchange.path[:128]}")
    await _reply(exchange, found)


async def _reply(exchange: Exchange, found: PageFile) -> None:
    headers = {**HEADERS, "etag": found.etag}
    if found.etag in (exchange.text_header(b"if-none-match") or ""):
        await exchange.start(304, headers)
        await exchange.write(b"", more=False)
        return
    await exchange.reply(200, found.body, headers, kind=found.kind)
