"""Where a server is, with which key, and the bytes of a request to it. Opens nothing."""

from __future__ import annotations

import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from microserve.protocol.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Endpoint:
    host: str
    port: int
    is_tls: bool = False
    prefix: str = ""
    """Before ``/v1/...``."""
    api_key: str = ""
    tls_cert: str = ""
    """File with the very certificate that it must show; empty: any that the system trusts."""

    @classmethod
    def at(cls, url: str, api_key: str = "", tls_cert: str = "") -> Endpoint:
        """``url`` with or without ``/v1``, as clients of OpenAI write it. Raises :class:`ConfigError`."""
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"{url!r} is no URL: {error}", field="url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname or not _is_plain(url):
            raise ConfigError(f"{url!r} is not http://HOST:PORT or https://HOST:PORT", field="url")
        if parts.username or parts.query or parts.fragment:
            raise ConfigError(f"{url!r} has more than host, port and path", field="url")
        if not _is_plain(api_key):
            raise ConfigError("an API key is ASCII without blanks", field="api_key")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if is_tls else 80), is_tls, prefix, api_key, tls_cert)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.is_tls else 'http'}://{host}:{self.port}{self.prefix}"

    def request(
        self, method: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> bytes:
        """One HTTP/1.1 request. Raises :class:`ConfigError` for a header that is none."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"host: {host}:{self.port}"]
        if self.api_key:
            lines.append(f"authorization: Bearer {self.api_key}")
        if body:
            lines += ["content-type: application/json", f"content-length: {len(body)}"]
        for name, value in (headers or {}).items():
            if not _is_plain(value):
                raise ConfigError(f"{name} is ASCII without blanks, not {value!r}", field=name)
            lines.append(f"{name}: {value}")
        return "\r\n".join([*lines, "", ""]).encode() + body

    def tls(self) -> ssl.SSLContext | None:
        """Whoever shows the certificate of ``tls_cert`` is the server, whatever name is in it."""
        if not self.is_tls:
            return None
        if not self.tls_cert:
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=self.tls_cert)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text
