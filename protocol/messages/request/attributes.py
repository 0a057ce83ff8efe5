"""What is known of a request beside its prompt: who asks, from where, for what. Strategies choose by it.

Owns the bounds (WIRE.md 5.1); where values come from is the gateway's (gateway/request/attributes.py).
"""

from __future__ import annotations

from collections.abc import Mapping

MAX_ATTRIBUTES = 16
"""Of one request."""
MAX_NAME_CHARS = 80
MAX_VALUE_CHARS = 512
MAX_PRIORITY = 100
"""Either way from 0."""
TENANT, PRIORITY = "tenant", "priority"
"""Every request has these two, from fields of their own of ``Generate``."""


def fault_of_attributes(attributes: Mapping[str, str]) -> str:
    """What is wrong with them as the attributes of one request, in words; empty: nothing."""
    if len(attributes) > MAX_ATTRIBUTES:
        return f"{len(attributes)} attributes, at most {MAX_ATTRIBUTES}"
    for name, value in attributes.items():
        if not 0 < len(name) <= MAX_NAME_CHARS:
            return f"an attribute's name has 1 to {MAX_NAME_CHARS} characters, not {len(name)}"
        if name in (TENANT, PRIORITY):
            return f"{name} has a field of its own"
        if len(value) > MAX_VALUE_CHARS:
            return f"{name} has {len(value)} characters, at most {MAX_VALUE_CHARS}"
    return ""
