"""Why keys do not share a cache: the salt under which a request's prefixes are known to the mesh.

A cached prefix is found only by requests with the same salt, so another key's prompts show neither in
``cached_tokens`` nor in time. Names outlive restarts and are the same at every gateway, so a key keeps its
cache. No client can ask for a salt that stands for a key: those begin with a mark of their own.
"""

from __future__ import annotations

from microserve.gateway.keys.key import ApiKey

_KEY = "key/"
_CLIENT = "salt/"


def cache_salt(key: ApiKey, client_salt: str, *, shared: bool) -> str:
    """``shared``: all keys have one cache (``gateway.shared_prefix_cache``), but for what a client salts."""
    if not shared and key.name:
        return f"{_KEY}{key.name}/{client_salt}"  # no name has a slash in it
    if client_salt.startswith((_KEY, _CLIENT)):
        return _CLIENT + client_salt
    return client_salt
