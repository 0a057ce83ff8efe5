"""What one request is called: by its client, and on the bus, where a name is used once.

    CLIENT              what came in ``x-request-id`` (or was made up), echoed there
    CLIENT.RANDOM       on this gateway, this time; in the body, behind ``cmpl-``, ``chatcmpl-`` or ``resp_``
    CLIENT.RANDOM-K     its choice K, on the bus
    CLIENT.RANDOM-K~N   the same at another router, after the N-th move

Owns this grammar, so that who has one of these names finds all that was said under the others.
"""

from __future__ import annotations

import re
import secrets

MAX_CLIENT_CHARS = 64
"""Of the client's own name, on the bus; the rest is room for what is put behind it."""

_BODY = re.compile(r"(?:chat)?cmpl-|resp_")
_MOVE, _CHOICE, _RANDOM = re.compile(r"~\d+$"), re.compile(r"-\d+$"), re.compile(r"\.[0-9a-f]{8}$")


def unique(client_id: str) -> str:
    """A client may repeat its name; this one is new."""
    return f"{client_id[:MAX_CLIENT_CHARS]}.{secrets.token_hex(4)}"


def of_choice(request_id: str, index: int) -> str:
    return f"{request_id}-{index}"


def moved(choice_id: str, num_moves: int) -> str:
    """A new name: the old router may be the new one, and may still have the old request."""
    return f"{choice_id}~{num_moves}"


def without_body_mark(name: str) -> str:
    """As on the bus: without what stands before it in a body."""
    return _BODY.sub("", name, count=1)


def is_named(request_id: str, wanted: str) -> bool:
    """Whether ``wanted``, any of the names above, is one of the request that the bus calls ``request_id``."""
    whole = {wanted, without_body_mark(wanted)}
    name = request_id
    for end in (_MOVE, _CHOICE):
        if name in whole:
            return True
        name = end.sub("", name)
    client = _RANDOM.sub("", name)
    if name in whole or client in whole:
        return True
    return client != name and len(client) == MAX_CLIENT_CHARS and wanted[:MAX_CLIENT_CHARS] == client
