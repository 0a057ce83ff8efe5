"""HTTP's ``Upgrade`` header as a server that offers no other protocol may treat it: as if it were not there.

Owns one connection's parser. httptools takes such a request for the last one in HTTP and drops its body; the
JDK's client sends the header (h2c) with every first request (RFC 9110 7.8 lets a server ignore it).
"""

from __future__ import annotations

from typing import Any

import httptools


class PlainParser:
    """What uvicorn asks of ``httptools.HttpRequestParser``, for requests with and without ``Upgrade``.

    The protocol must not begin a request while ``wants_upgrade``: the same one comes once more, without it.
    """

    def __init__(self, protocol: Any) -> None:
        """``protocol`` gets httptools' callbacks and keeps ``url`` and ``headers`` of the current request."""
        self._protocol = protocol
        self._parser = _make_parser(protocol)

    @property
    def wants_upgrade(self) -> bool:
        return self._parser.should_upgrade()

    def feed_data(self, data: bytes) -> None:
        """Raises ``httptools.HttpParserError`` for what is no HTTP, and for CONNECT, which nobody offers."""
        while data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = self._without_upgrade() + data[upgrade.args[0] :]
                self._parser = _make_parser(self._protocol)
            else:
                return

    def _without_upgrade(self) -> bytes:
        """The head that has been read, as its client would have written it without an upgrade."""
        method, version = self._parser.get_method(), self._parser.get_http_version()
        if method == b"CONNECT":
            raise httptools.HttpParserError("CONNECT is not offered")
        lines = [b"%b %b HTTP/%b" % (method, self._protocol.url, version.encode())]
        for name, value in self._protocol.headers:
            if name == b"connection":
                options = [option.strip() for option in value.split(b",")]
                value = b", ".join(option for option in options if option.lower() != b"upgrade")  # noqa: PLW2901
            if name != b"upgrade":
                lines.append(b"%b: %b" % (name, value))
        return b"\r\n".join([*lines, b"", b""])

    # --- as httptools' own ---------------------------------------------------------------------------

    def should_upgrade(self) -> bool:
        return False

    def should_keep_alive(self) -> bool:
        return self._parser.should_keep_alive()

    def get_method(self) -> bytes:
        return self._parser.get_method()

    def get_http_version(self) -> str:
        return self._parser.get_http_version()


def _make_parser(protocol: Any) -> httptools.HttpRequestParser:
    parser = httptools.HttpRequestParser(protocol)
    # As uvicorn has it: what comes behind a request that closes the connection is not an error.
    parser.set_dangerous_leniencies(lenient_data_after_close=True)
    return parser
