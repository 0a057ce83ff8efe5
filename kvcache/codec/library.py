"""What ways of making KV small were measured to bring and to cost, for one model: a library, a JSON file.

`microserve profile` writes it, engines read it. Times are those of *one payload*, which is one layer of one
chunk of tokens: ``seconds = a_s + s_per_byte * raw bytes``, of encoding and decoding, on one thread. Ratios
count every byte of a payload, its header and scales too. Plain data and its file; does not know how any of it
was measured, nor who chooses.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import msgspec

from microserve.kvcache.codec.profile import NONE, Profile
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.kv.coding import AUTO, MAX_CODEC_CHARS
from microserve.protocol.messages.kv.geometry import UNSAID, Geometry

VERSION = 1
"""Of the file's form; a file of another one is refused."""
MAX_LIBRARY_NBYTES = 16 << 20
MAX_ENTRIES = 4096


class Cost(msgspec.Struct, frozen=True):
    """Of one payload: ``a_s + s_per_byte * raw bytes`` seconds."""

    a_s: float = 0.0
    s_per_byte: float = 0.0

    def seconds(self, raw_nbytes: int, num_payloads: int = 1) -> float:
        """Of so many payloads that have ``raw_nbytes`` together."""
        return num_payloads * self.a_s + self.s_per_byte * raw_nbytes


class Quality(msgspec.Struct, frozen=True):
    """What is left of a model's answers. Of what loses nothing: as it stands here."""

    score: float = 1.0
    """Of the task, as a share of what it is with KV as it is; ``quality_floor`` is held against it."""
    score_low: float = 1.0
    """Confidence interval of ``score``, 95 %."""
    score_high: float = 1.0
    logit_kl: float = 0.0
    """Mean divergence of the next token's distribution, nats."""
    attention_error: float = 0.0
    """Relative L2 of attention's outputs."""
    greedy_agreement: float = 1.0
    """Share of greedy tokens that are the same."""


class Measured(msgspec.Struct, frozen=True):
    """One profile with what was measured of it."""

    profile: Profile
    ratio: float
    """Raw bytes / bytes on the wire."""
    encode: Cost
    decode: Cost
    quality: Quality = Quality()


class Library(msgspec.Struct, frozen=True):
    """What was measured of one model on one kind of machine; ``none`` needs no entry."""

    version: int = VERSION
    model: str = ""
    revision: str = ""
    """Empty: not said."""
    dtype: str = ""
    geometry: Geometry = UNSAID
    workload: str = ""
    """Name and digest of what was served to measure quality."""
    machine: str = ""
    made: str = ""
    """Date, and the command that wrote it."""
    head_scores: list[list[float]] | None = None
    """``[layers][heads]``: how much of a head's attention goes far back. What ``mixed_head`` goes by."""
    entries: list[Measured] = []

    def profile(self, name: str) -> Profile | None:
        """By its name; None: not in it. ``none`` is in every library."""
        if name == NONE.name:
            return NONE
        return next((each.profile for each in self.entries if each.profile.name == name), None)


RAW = Measured(NONE, 1.0, Cost(), Cost())
"""KV as it is, which is always a candidate."""
BUILT_IN = Library(
    made="assumed, not measured",
    entries=[
        Measured(Profile("lossless-zstd", coder="zstd"), 1.2, Cost(5e-5, 6e-9), Cost(3e-5, 2.5e-9)),
        Measured(Profile("lossless-rans", coder="rans"), 1.25, Cost(5e-5, 1e-8), Cost(5e-5, 1e-8)),
    ],
)
"""What every engine knows without a file: it loses nothing. Careful figures to begin with; what transfers
then take corrects them."""


def load(path: str) -> Library:
    """Of the file at ``path``. Raises :class:`ConfigError`, which names the file and what is wrong in it."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(MAX_LIBRARY_NBYTES + 1)
    except OSError as error:
        raise ConfigError(f"codec library {path}: {error.strerror}", field="engine.codec_library") from None
    if len(data) > MAX_LIBRARY_NBYTES:
        raise _wrong(path, f"more than {MAX_LIBRARY_NBYTES} bytes")
    try:
        return decode(data)
    except ConfigError as error:
        raise _wrong(path, error.detail) from None


def decode(data: bytes) -> Library:
    """Of the bytes of a file. Raises :class:`ConfigError`."""
    try:
        plain = msgspec.json.decode(data)
        if not isinstance(plain, dict):
            raise ConfigError("not an object")
        if plain.get("version", VERSION) != VERSION:
            raise ConfigError(f"version {plain['version']!r}, expected {VERSION}")
        if isinstance(said := plain.get("geometry"), dict):
            plain["geometry"] = _geometry(said)
        library = msgspec.convert(plain, Library)
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(str(error)) from None
    _check(library)
    return library


def save(library: Library, path: str) -> None:
    """Whole or not at all: readers see the old file until the new one is written. Raises :class:`ConfigError`
    for what :func:`load` would refuse, and :class:`OSError`."""
    data = encode(library)
    scratch = Path(f"{path}.{os.getpid()}.new")
    try:
        scratch.write_bytes(data)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def encode(library: Library) -> bytes:
    """As :func:`decode` reads it. Raises :class:`ConfigError`."""
    _check(library)
    plain: dict[str, Any] = msgspec.to_builtins(library)
    plain["geometry"] = dict(zip(Geometry.__struct_fields__, plain["geometry"], strict=True))
    return msgspec.json.format(msgspec.json.encode(plain), indent=1) + b"\n"


def _geometry(said: dict[str, Any]) -> list[Any]:
    """By names in the file, by places on the wire."""
    if unknown := sorted(said.keys() - set(Geometry.__struct_fields__)):
        raise ConfigError(f"geometry.{unknown[0]} is unknown")
    return [said.get(field, getattr(UNSAID, field)) for field in Geometry.__struct_fields__]


def _check(library: Library) -> None:
    if len(library.entries) > MAX_ENTRIES:
        raise ConfigError(f"{len(library.entries)} entries, at most {MAX_ENTRIES}")
    names: set[str] = set()
    for index, entry in enumerate(library.entries):
        fault = _fault(entry)
        if not fault and entry.profile.name in names:
            fault = f"a second profile {entry.profile.name}"
        if fault:
            raise ConfigError(f"entries[{index}]: {fault}")
        names.add(entry.profile.name)
    scores, geometry = library.head_scores, library.geometry
    if scores is not None:
        shape = {len(each) for each in scores}
        if len(shape) != 1 or not all(math.isfinite(score) for each in scores for score in each):
            raise ConfigError("head_scores: expected finite numbers, as many in each layer")
        if geometry.is_said and (len(scores), *shape) != (geometry.num_layers, geometry.num_kv_heads):
            raise ConfigError(
                f"head_scores: {len(scores)} layers of {shape.pop()} heads, the geometry has"
                f" {geometry.num_layers} of {geometry.num_kv_heads}"
            )


def _fault(entry: Measured) -> str:
    if not entry.profile.name or (entry.profile.name == NONE.name and entry.profile != NONE):
        return "a profile without a name" if not entry.profile.name else "the name none is of KV as it is"
    name = entry.profile.name
    if len(name) > MAX_CODEC_CHARS or not (name.isascii() and name.isprintable()) or name == AUTO:
        return f"the name {name[:MAX_CODEC_CHARS]!r}: at most {MAX_CODEC_CHARS} printable ASCII, not {AUTO!r}"
    if not (math.isfinite(entry.ratio) and entry.ratio > 0):
        return f"ratio {entry.ratio}, expected more than 0"
    for stage in ("encode", "decode"):
        cost: Cost = getattr(entry, stage)
        for field in ("a_s", "s_per_byte"):
            if not 0 <= (value := getattr(cost, field)) < math.inf:
                return f"{stage}.{field} {value}, expected 0 or more"
    quality = entry.quality
    for field in Quality.__struct_fields__:
        if not math.isfinite(getattr(quality, field)):
            return f"quality.{field} is not a number"
    if not quality.score_low <= quality.score <= quality.score_high:
        return "quality.score is outside its interval"
    return ""


def _wrong(path: str, why: str) -> ConfigError:
    return ConfigError(f"codec library {path}: {why}", field="engine.codec_library")
