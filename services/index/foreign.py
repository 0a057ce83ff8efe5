"""Engines of other people whose KV events are followed, as ``index.foreign`` names them (WIRE.md 7.5).

    ID model=NAME events=ADDRESS [replay=ADDRESS] block_size=TOKENS [rank=N]

Such an engine knows nothing of us: it cannot register, beat or be asked for anything. The index counts it
among its members for as long as the settings name it, and whether it lives is seen by its replay alone.

Owns what a line means. Does not know how events are followed (links/follow.py).
"""

from __future__ import annotations

from collections.abc import Sequence

from microserve.protocol.bus.address import port_of, shifted
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.engine_info import EngineInfo
from microserve.protocol.types import MAX_REQUEST_ID_CHARS, WIRE_VERSION

FIELD = "index.foreign"
BACKEND = "events"
"""In the place of what computes, for people: all that is known of it."""
_REQUIRED = ("model", "events", "block_size")
_KNOWN = (*_REQUIRED, "replay", "rank")
MAX_BLOCK_SIZE = 1 << 20


def foreign_engines(lines: Sequence[str], incarnation: int) -> list[EngineInfo]:
    """Raises :class:`ConfigError` that quotes the line. ``incarnation``: of the index, as whose life each is
    a member."""
    engines = [_engine(line, incarnation) for line in lines]
    seen: set[str] = set()
    for engine in engines:
        if engine.engine_id in seen:
            raise ConfigError(f"{FIELD} names {engine.engine_id} twice", field=FIELD)
        seen.add(engine.engine_id)
    return engines


def _engine(line: str, incarnation: int) -> EngineInfo:
    def wrong(problem: str) -> ConfigError:
        return ConfigError(f"{FIELD} {line!r}: {problem}", field=FIELD)

    engine_id, *words = line.split() or [""]
    if not 1 <= len(engine_id) <= MAX_REQUEST_ID_CHARS or "=" in engine_id:
        raise wrong(f"it begins with the engine's id, of 1 to {MAX_REQUEST_ID_CHARS} characters")
    said: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if name not in _KNOWN or not equals or not value or name in said:
            raise wrong(f"{word!r} is none of {', '.join(f'{each}=' for each in _KNOWN)}, each once")
        said[name] = value
    if missing := [name for name in _REQUIRED if name not in said]:
        raise wrong(f"{missing[0]}= is missing")

    def number(name: str, least: int, most: int) -> int:
        value = said.get(name, "0")
        if not value.isascii() or not value.isdecimal() or not least <= int(value) <= most:
            raise wrong(f"{name} is a number from {least} to {most}, is {value!r}")
        return int(value)

    rank = number("rank", 0, 65535)
    block_size = number("block_size", 1, MAX_BLOCK_SIZE)

    def address(name: str) -> str:
        """Of that rank: vLLM and SGLang give each its own ports, one behind the other."""
        value = said.get(name, "")
        if value and not value.startswith("ipc://") and not (value.startswith("tcp://") and port_of(value)):
            raise wrong(f"{name} is tcp://HOST:PORT or ipc://PATH, is {value!r}")
        try:
            return shifted(value, rank)
        except ValueError as error:
            raise wrong(str(error)) from None

    return EngineInfo(
        engine_id=engine_id,
        incarnation=incarnation,
        address="",
        events_address=address("events"),
        replay_address=address("replay"),
        model=said["model"],
        labels=[],
        block_size=block_size,
        num_blocks=0,
        num_layers=0,
        max_model_len=0,
        vocab_size=0,
        eos_token_ids=[],
        layout_hash="",
        heap="",
        wire_version=WIRE_VERSION,
        backend=BACKEND,
        can=[],
        events_open=True,
    )
