"""What a plan is made from, as a JSON file: how fast each cluster computes, and what its KV weighs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from microserve.protocol.errors import ConfigError
from microserve.services.clusters.curve import Curve
from microserve.services.clusters.lengths import Lengths, LengthSpec

VERSION = 1
GBIT = 1e9 / 8
"""Bytes a second that one Gbit/s is."""
Positive = Annotated[float, Meta(gt=0.0)]
Count = Annotated[int, Meta(ge=1, le=4096)]


class Side(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One cluster's engines, which are all alike."""

    instances: Count
    prefill_s: Curve
    """Seconds to compute a prompt of so many tokens, on one engine."""
    kind: str = ""
    places: Annotated[int, Meta(ge=0)] = 0
    """Answers that one engine decodes at a time."""
    step_s: Annotated[float, Meta(ge=0.0)] = 0.0
    """Seconds of one decode step with all places taken."""


class ClusterProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``remote`` only computes prompts; ``local`` computes and decodes, and is where answers are."""

    version: int
    kv_nbytes: Curve
    """Bytes that go over the link for a prompt of so many tokens."""
    link_gbps: Positive
    """Of KV, from ``remote`` to ``local``; headers of packets are not in it."""
    output_tokens: Positive
    """Of a mean answer."""
    remote: Side
    local: Side
    lengths: LengthSpec | None = None
    """Of prompts, in tokens that no cache has; a plan may be given others."""
    what: str = ""
    """Where the figures come from, for people."""

    @property
    def decode_rate(self) -> float:
        """Answers a second that one local engine decodes."""
        return self.local.places / (self.local.step_s * self.output_tokens)


def load_profile(path: str | Path) -> ClusterProfile:
    """Raises :class:`ConfigError` that names the file and the field."""
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="profile") from None
    try:
        profile = msgspec.json.decode(text, type=ClusterProfile)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}", field="profile") from None
    if profile.version != VERSION:
        raise ConfigError(f"{path}: version {profile.version}, this build reads {VERSION}", field="version")
    try:
        profile.kv_nbytes.check("kv_nbytes")
        profile.remote.prefill_s.check("remote.prefill_s")
        profile.local.prefill_s.check("local.prefill_s")
        if profile.lengths is not None:
            Lengths.of(profile.lengths)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error.detail}", field=error.field) from None
    for name in ("places", "step_s"):
        if not getattr(profile.local, name):
            raise ConfigError(f"{path}: local.{name} must be above 0", field=f"local.{name}")
    return profile
