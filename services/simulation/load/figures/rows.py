"""A file with one line for each request of each run: JSON lines, or CSV for a spreadsheet."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from microserve.services.simulation.load.figures.result import Row


class RowFile:
    """A context manager; CSV where the name ends so. Raises ``OSError`` when it cannot be written."""

    def __init__(self, path: str) -> None:
        self._is_csv = path.endswith(".csv")
        self._file = Path(path).open("w", encoding="utf-8", newline="")  # noqa: SIM115 - closed in __exit__
        self._csv = csv.writer(self._file)
        if self._is_csv:
            self._csv.writerow(Row.__struct_fields__)

    def write(self, rows: Iterable[Row]) -> None:
        for row in rows:
            if self._is_csv:
                self._csv.writerow([_cell(getattr(row, name)) for name in Row.__struct_fields__])
            else:
                self._file.write(msgspec.json.encode(row).decode() + "\n")
        self._file.flush()

    def __enter__(self) -> RowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def _cell(value: Any) -> Any:
    """Names of engines with a blank between, attributes as JSON, nothing for None."""
    if isinstance(value, list):
        return " ".join(value)
    if isinstance(value, dict):
        return msgspec.json.encode(value).decode() if value else ""
    return value
