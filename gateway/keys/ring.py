"""From a header to the key behind it: ``Authorization: Bearer KEY`` or ``x-api-key: KEY``.

Owns the keys in force, which are taken over whole or not at all. Any bytes may come in: what is no key of
ours is :class:`Unauthorized` and nothing else.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable

from microserve.gateway.keys.key import ANONYMOUS, ApiKey
from microserve.protocol.errors import RequestError


class Unauthorized(RequestError):
    """No API key, or an unknown one."""

    code = "invalid_api_key"


class KeyRing:
    """The keys that may use this gateway; ``None`` asks for none and lets everyone in."""

    def __init__(self, keys: Iterable[ApiKey] | None) -> None:
        self._secret = secrets.token_bytes(32)
        self._keys: dict[bytes, ApiKey] | None = None
        if keys is not None:
            self.replace(keys)

    @property
    def is_open(self) -> bool:
        """No key is asked for."""
        return self._keys is None

    def __len__(self) -> int:
        return len({key.name for key in (self._keys or {}).values()})

    def by_name(self) -> dict[str, ApiKey]:
        """The keys in force; none where none is asked for."""
        return {key.name: key for key in (self._keys or {}).values()}

    def replace(self, keys: Iterable[ApiKey]) -> None:
        """These and no others from now on; an empty ring lets nobody in."""
        self._keys = {self._blind(bytes.fromhex(digest)): key for key in keys for digest in key.sha256}

    def check(self, authorization: bytes | None, api_key: bytes | None = None) -> ApiKey:
        """The key behind the values of the two headers. Raises :class:`Unauthorized`."""
        if self._keys is None:
            return ANONYMOUS
        scheme, _, given = (authorization or b"").strip().partition(b" ")
        if scheme.lower() != b"bearer":
            given = b""
        given = given.strip() or (api_key or b"").strip()
        if not given:
            raise Unauthorized("this gateway needs an API key: send 'Authorization: Bearer KEY'")
        found = self._keys.get(self._blind(hashlib.sha256(given).digest()))
        if found is None:
            raise Unauthorized("unknown API key")
        return found

    def _blind(self, digest: bytes) -> bytes:
        """What digests are looked up by: under a secret of this process, so that the time of a look-up, or of
        a comparison within it, has nothing to do with how close a guess came."""
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()
