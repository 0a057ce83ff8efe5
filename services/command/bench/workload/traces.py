"""Requests that are written down: Mooncake's traces, Azure's, and files of prompts. Reads files; sends
nothing."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import msgspec

from microserve.protocol.errors import ConfigError
from microserve.services.simulation.load.trace import MAX_TOKENS, TraceRequest, read_trace

AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_FRACTION = re.compile(r"\.(\d{6})\d+")


class Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One of a file of prompts: a text or a conversation, and perhaps how long its answer may be."""

    prompt: str | None = None
    messages: Annotated[list[dict[str, Any]], msgspec.Meta(min_length=1)] | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=1, le=MAX_TOKENS)] | None = None
    answer: Annotated[str, msgspec.Meta(min_length=1)] | None = None
    """What a right answer begins with: `microserve profile` looks at it, nobody else."""


def read_requests(path: str, num_requests: int, longest: int) -> list[TraceRequest]:
    """Of a trace in either format, in order of time; 0: all. Raises :class:`ConfigError`."""
    if path.endswith(".csv"):
        return _read_azure(path, num_requests, longest)
    return read_trace(path, num_requests, longest)


def _read_azure(path: str, num_requests: int, longest: int) -> list[TraceRequest]:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            every = _azure_rows(path, file)
            fitting = (each for each in every if not longest or each.num_tokens <= longest)
            read = list(islice(fitting, num_requests or None))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"cannot read {path}: {error}", field="trace") from None
    if not read:
        raise ConfigError(f"{path} has no such requests", field="trace")
    return read


def _azure_rows(path: str, file: Any) -> Iterator[TraceRequest]:
    rows = csv.DictReader(file)
    missing = [name for name in AZURE if name not in (rows.fieldnames or ())]
    if missing:
        raise ConfigError(f"{path} has no column {missing[0]}", field="trace")
    before = 0.0
    for number, row in enumerate(rows, 2):
        where = f"{path}, line {number}"
        try:
            at = datetime.fromisoformat(_FRACTION.sub(r".\1", row[AZURE[0]]))
            prompt, output = int(row[AZURE[1]]), int(row[AZURE[2]])
        except (ValueError, TypeError) as error:
            raise ConfigError(f"{where}: {error}", field="trace") from None
        at_s = (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()
        if not 1 <= prompt <= MAX_TOKENS or not 0 <= output <= MAX_TOKENS:
            raise ConfigError(f"{where}: tokens must be between 1 and {MAX_TOKENS}", field="trace")
        if at_s < before:
            raise ConfigError(f"{where}: {row[AZURE[0]]} is before the last", field="trace")
        before = at_s
        yield TraceRequest(at_s, prompt, max(1, output), ())


def read_prompts(path: str) -> list[Line]:
    """Raises :class:`ConfigError` that names file and line."""
    found = []
    try:
        with Path(path).open("rb") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line = msgspec.json.decode(text, type=Line)
                except (ValueError, RecursionError) as error:
                    raise ConfigError(f"{path}, line {number}: {error}", field="file") from None
                if (line.prompt is None) == (line.messages is None):
                    raise ConfigError(f"{path}, line {number}: prompt or messages, one of them", field="file")
                found.append(line)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="file") from None
    if not found:
        raise ConfigError(f"{path} has no prompts", field="file")
    return found
