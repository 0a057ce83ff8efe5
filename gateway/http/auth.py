"""API keys: ``Authorization: Bearer KEY``, compared in constant time.

Owns the keys' digests only; which paths are open is the application's decision.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from microserve.gateway.http.errors import Unauthorized


class KeyRing:
    """The keys that may use this gateway; an empty ring lets everyone in."""

    def __init__(self, api_keys: Iterable[str]) -> None:
        # Digests have one length, so that comparing them says nothing about a key's length.
        self._digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    def check(self, authorization: bytes | None) -> None:
        """``authorization`` is the header's value. Raises :class:`Unauthorized`."""
        if not self._digests:
            return
        scheme, _, key = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer" or not key.strip():
            raise Unauthorized("this gateway needs an API key: send 'Authorization: Bearer KEY'")
        digest = hashlib.sha256(key.strip()).digest()
        # No early exit: the time taken must not say which key came close.
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise Unauthorized("unknown API key")
