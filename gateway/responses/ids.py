"""What responses and their items are called: an item's name tells whose it is.

resp_UNIQUE     a response; UNIQUE is the request's own name, where no client has given it one
msg_UNIQUE_N    item N of its output (``rs``: a thought, ``fc``: a call)
msg_UNIQUE_iN   item N of its input, where the client has no name for it
"""

from __future__ import annotations

import re
from hashlib import blake2b

PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc", "function_call_output": "fco"}
_UNIQUE = re.compile(r"[0-9a-f]{32}")
_ITEM = re.compile(r"(?:msg|rs|fc|fco)_([0-9a-f]{32})_i?\d{1,6}")
_RESPONSE = re.compile(r"resp_[0-9a-f]{32}")


def unique_of(request_id: str) -> str:
    """Of a request's name as logs have it; a client's own may have characters that no path has."""
    if _UNIQUE.fullmatch(request_id):
        return request_id
    return blake2b(request_id.encode(), digest_size=16).hexdigest()


def response_id(unique: str) -> str:
    return f"resp_{unique}"


def item_id(kind: str, unique: str, index: int) -> str:
    return f"{PREFIXES[kind]}_{unique}_{index}"


def input_id(kind: str, unique: str, index: int) -> str:
    return f"{PREFIXES[kind]}_{unique}_i{index}"


def is_response(name: str) -> bool:
    return _RESPONSE.fullmatch(name) is not None


def response_of_item(name: str) -> str | None:
    """None for a name that is not one of ours."""
    found = _ITEM.fullmatch(name)
    return None if found is None else response_id(found[1])
