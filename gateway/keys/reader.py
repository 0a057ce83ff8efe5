"""The keys' file, read anew when it has changed: no restart to give somebody a key, or to take one away.

Owns the file as it was last seen. A file that cannot be read or is wrong changes nothing: the keys before it
stay in force, and the log says so once for each mistake. One that is just being written looks as if keys had
been taken away, and is valid: a change is read when two looks have found it the same. Reads happen off the
loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import structlog

from microserve.gateway.keys.key import MAX_FILE_NBYTES, ApiKey, parse_keys
from microserve.protocol import log
from microserve.protocol.errors import ConfigError

LOOK_S = 1.0
"""Between two looks at the file."""

_Stamp = tuple[int, int, int]
_logger = structlog.get_logger()


class KeyReader:
    """``read`` once at the start, then ``watch``."""

    def __init__(self, path: str, *, look_s: float | None = None) -> None:
        self._path = Path(path)
        self._look_s = LOOK_S if look_s is None else look_s
        self._stamp: _Stamp | None = None
        self._seen: _Stamp | None = None
        """At the last look."""
        self._mistake = ""
        self._asked = asyncio.Event()

    def read(self) -> list[ApiKey]:
        """Raises :class:`ConfigError` when there is no such file, or it is wrong."""
        try:
            stamp = self._look()
            with self._path.open("rb") as file:
                content = file.read(MAX_FILE_NBYTES + 1)
            text = content.decode()
        except OSError as error:
            raise ConfigError(
                f"gateway.api_keys_file: cannot read {self._path}: {error.strerror}",
                field="gateway.api_keys_file",
            ) from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{self._path}: {error}", field="gateway.api_keys_file") from None
        if len(content) > MAX_FILE_NBYTES:
            raise ConfigError(
                f"{self._path} has more than {MAX_FILE_NBYTES} bytes", field="gateway.api_keys_file"
            )
        keys = parse_keys(text, str(self._path))
        self._stamp = stamp  # of before the read: what was written meanwhile is seen at the next look
        return keys

    def ask(self) -> None:
        """Read it now, whether it looks changed or not (SIGHUP)."""
        self._asked.set()

    async def watch(self, take: Callable[[list[ApiKey]], None]) -> None:
        """Hand every new set of keys to ``take``, until cancelled."""
        while True:
            try:
                async with asyncio.timeout(self._look_s):
                    await self._asked.wait()
            except TimeoutError:
                pass
            asked = self._asked.is_set()
            self._asked.clear()
            try:
                keys = await asyncio.to_thread(self.read_if_changed, asked)
                if keys is not None:
                    take(keys)
            except Exception as error:
                self._stamp = None
                self._tell(error)
            else:
                if keys is not None:
                    self._mistake = ""
                    _logger.info(log.KEYS_READ, path=str(self._path), keys=len(keys))

    def read_if_changed(self, asked: bool = False) -> list[ApiKey] | None:
        """One look. Raises as :meth:`read`, and OSError."""
        seen, self._seen = self._seen, self._look()
        if not asked and (self._seen == self._stamp or self._seen != seen):
            return None
        return self.read()

    def _look(self) -> _Stamp:
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size, stat.st_ino

    def _tell(self, error: Exception) -> None:
        detail = str(error)
        if detail != self._mistake:
            self._mistake = detail
            _logger.error(log.KEYS_REJECTED, path=str(self._path), error=detail)
