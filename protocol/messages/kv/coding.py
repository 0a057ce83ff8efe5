"""How KV goes over a link in fewer bytes, as engines say it to each other (WIRE.md 4.8).

A receiver says in its grant what it can decode, and how busy its decoder is; a sender says in ``Sent`` what
it did. Plain data; knows no codec (kvcache/codec).
"""

from __future__ import annotations

import msgspec

AUTO = "auto"
"""Of ``RemoteSend.codec``: the sender chooses."""
MAX_CODEC_CHARS = 96
"""Longest name of a profile, and of what a receiver decodes."""
MAX_CODECS = 32
"""Most names in ``Decoding.codecs``."""


class Decoding(msgspec.Struct, frozen=True, array_like=True):
    """What the giver of a grant decodes."""

    codecs: list[str]
    """Version and entropy coder of payloads that it reads, as ``kv1:zstd``."""
    queued_s: float = 0.0
    """Work that waits for its decoder, in seconds."""
    ns_per_byte: float = 0.0
    """What a byte of KV has cost it lately, decoded; 0: none was."""


class Coding(msgspec.Struct, frozen=True, array_like=True):
    """What became of a send that was asked to go in fewer bytes, as its sender saw it."""

    profile: str
    """Name of the profile that it went by; ``none``: as it is."""
    raw_nbytes: int
    """Of the KV that was sent."""
    wire_nbytes: int
    """Put for it: payloads, and what went as it is."""
    encode_s: float = 0.0
    """Time of the encoder, all its threads together."""
    predicted_s: float = 0.0
    """Encoding, sending and decoding, as predicted when the profile was chosen; 0: nobody did."""
    observed_s: float = 0.0
    """The same as it came: measured here, but for the decoding."""
    link_bytes_per_s: float = 0.0
    """Of the network to the receiver, as it was known when the profile was chosen; 0: not known."""
    is_lossy: bool = False
    """Some of what was put by it lost something."""
    reason: str = ""
    """Why that profile (kvcache/codec/choice/decision.py): ``asked``, ``refused``, ``model``, ``learned``,
    ``explored``, ``unknown_link``, ``none_feasible``; empty: not said."""
