"""What a run has measured, line by line in a file: a run that is broken off goes on from there.

The first line says of which run it is; a file of another one is not touched.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec

from microserve.protocol.errors import ConfigError

T = TypeVar("T")


class _Line(msgspec.Struct, frozen=True):
    kind: str
    name: str
    value: msgspec.Raw


class Journal:
    def __init__(self, path: Path, run: str) -> None:
        """run: text that is equal for runs whose measurements are the same. Raises :class:`ConfigError`."""
        self.path = path
        self._found: dict[tuple[str, str], msgspec.Raw] = {}
        head = msgspec.json.encode({"run": run}) + b"\n"
        try:
            if path.exists():
                self._read(path.read_bytes(), head)
            self._file = path.open("ab")
            if not self._file.tell():
                self._file.write(head)
                self._file.flush()
        except OSError as error:
            raise ConfigError(f"cannot write {path}: {error.strerror}", field="out") from None

    def _read(self, data: bytes, head: bytes) -> None:
        if data and not data.startswith(head):
            raise ConfigError(
                f"{self.path} is of a run of other prompts, of another model or with other flags: delete it, "
                "or take another --out",
                field="out",
            )
        whole = data[: data.rfind(b"\n") + 1]  # it may have been broken off within a line
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        for text in whole[len(head) :].splitlines():
            line = msgspec.json.decode(text, type=_Line)
            self._found[line.kind, line.name] = line.value

    def __len__(self) -> int:
        """Measurements that are there."""
        return len(self._found)

    def known(self, kind: str, name: str, type_: type[T], measure: Callable[[], T]) -> T:
        """What is in the file; else what ``measure`` says, which is in the file then."""
        raw = self._found.get((kind, name))
        if raw is not None:
            return msgspec.json.decode(raw, type=type_)
        value = measure()
        raw = msgspec.Raw(msgspec.json.encode(value))
        self._found[kind, name] = raw
        self._file.write(msgspec.json.encode(_Line(kind, name, raw)) + b"\n")
        self._file.flush()
        return value

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
