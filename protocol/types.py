"""Names for the plain values that cross a process border, and the bounds that every channel shares.

Owns nothing but names: a reader of any signature should know which string is which.
"""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
"""One request in the whole mesh; made by the gateway, unique for ever."""

EngineId = NewType("EngineId", str)
"""One engine's place in the mesh; survives a restart of its process."""

Incarnation = NewType("Incarnation", int)
"""One life of one process: a random non-zero 62-bit number, made at start and never reused."""

GrantId = NewType("GrantId", str)
"""One permission to write into one receiver's blocks."""

WIRE_VERSION = 1
"""The first byte of every header frame; a peer with another version is refused (WIRE.md 2)."""

NO_KEY = "none"
"""In the place of a server's public key: it speaks without CURVE, whatever keys we have."""

MAX_REQUEST_ID_CHARS = 128
"""Longer ids are refused: an id is a key in every table of the mesh."""

MAX_URL_CHARS = 256
"""Of a gateway, as it says; more is not believed."""

MAX_BULK_NBYTES = 64 << 20
"""All bulk frames of one message together; a longer frame costs its sender the connection."""

MAX_REQUEST_FRAME_NBYTES = 8 << 20
"""Longest frame that a bound socket takes: nobody has to show a key before the first has come."""

MAX_PROMPT_TOKENS = MAX_REQUEST_FRAME_NBYTES // 4
"""A prompt is one frame, on every socket that it passes."""

Buffer = bytes | memoryview
"""A frame as it came, copied or not."""
