"""What answers before there is a control plane: one HTTP server that sends the same answer to everything.

    python benchmarks/mesh/control_parts/bare.py        # prints its URL

Its time is what the client and this machine's loopback take; what a mesh takes longer, it adds.
"""

from __future__ import annotations

import asyncio

import uvloop

_BODY = b'{"choices":[{"text":" four words of text","index":0,"finish_reason":"length"}]}'
_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(_BODY),
    _BODY,
)


class _Answering(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport
        self._data = b""

    def data_received(self, data: bytes) -> None:
        self._data += data
        head, found, body = self._data.partition(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0] or 0) if found else 0
        if found and len(body) >= length:
            self._data = body[length:]
            self._transport.write(_ANSWER)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(_Answering, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
