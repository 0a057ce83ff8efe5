"""Which results of a request are a failure of the mesh."""

from __future__ import annotations

_ENDS = ("stop", "length", "abort")
_CLIENTS = ("invalid_.*", ".*_not_found", "prompt_too_long", "not_permitted")
"""Codes of what the client has asked for and cannot have."""

FAILED = f"!~{'|'.join((*_ENDS, *_CLIENTS))}"
"""Of the label ``result``; codes that are not known yet are failures."""
