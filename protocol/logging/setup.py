"""The one place where loggers are made: ``configure``, once a process.

Owns the way from a call of structlog to a line, the level, and what of it all can be changed while the
process runs. Nothing that is logged raises, whatever it holds.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from typing import Any

import structlog

from microserve.protocol.errors import ConfigError
from microserve.protocol.logging.capture import Capture
from microserve.protocol.logging.printable import printable
from microserve.protocol.logging.sampling import Sampler, key_of
from microserve.protocol.logging.sink import DescriptorSink, FileSink, Sink, TextSink
from microserve.protocol.logging.writer import Writer
from microserve.protocol.settings.settings import LogSettings

CLOSE_S = 2.0
"""The end of a process waits so long for its last lines."""
UNENCODABLE = "unencodable"

_JOURNAL_LEVELS = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""Priorities of syslog, which journald reads from ``<N>`` in front of a line."""
_LARGEST = 1 << 20
"""Characters of one line; a longer one keeps its name and says so."""

_traces = structlog.processors.ExceptionRenderer(
    structlog.tracebacks.ExceptionDictTransformer(show_locals=False)  # locals could hold keys or prompt text
)
_encoder = json.JSONEncoder(default=repr, allow_nan=False)  # ASCII: a terminal that shows it obeys nothing


class Log:
    """What this process says; ``configure`` makes it."""

    def __init__(
        self, service: str, service_id: str, sink: Sink, settings: LogSettings, *, on_terminal: bool = False
    ) -> None:
        self.level = settings.level
        self._who = {"service": service, "id": service_id}
        self._sampler = Sampler(settings.max_refusals_per_s)
        self._has_priority = isinstance(sink, DescriptorSink) and _is_journal()
        self._console = structlog.dev.ConsoleRenderer() if on_terminal else None
        self._writer = Writer(sink, self._sampler, self._own_line)
        self._capture = Capture()

    @property
    def dropped(self) -> Mapping[str, int]:
        """Lines that could not be written so far, by reason."""
        return self._writer.dropped

    @property
    def left_out(self) -> int:
        """Lines of floods that were counted instead."""
        return self._sampler.left_out

    # --- a line ----------------------------------------------------------------------------------

    def process(self, _logger: Any, method: str, event: MutableMapping[str, Any]) -> Any:
        """The only processor: structlog goes no further."""
        name = event.get("event")
        try:
            key = key_of(event)
            if key is None or self._writer.admit(key):
                try:
                    line = self._line(method, event)
                except Exception as error:  # a value whose repr raises, say
                    line = self._line(method, {"event": name, UNENCODABLE: type(error).__name__})
                self._writer.put(str(name), line)
        except Exception:  # whatever it is, it is not worth what serves
            self._writer.drop("", UNENCODABLE)
        raise structlog.DropEvent

    def _line(self, method: str, event: MutableMapping[str, Any]) -> bytes:
        level = "error" if method == "exception" else method
        event = structlog.contextvars.merge_contextvars(None, method, dict(event))
        event.update(self._who, level=level, ts=round(time.time(), 6))
        if self._console is not None:
            return self._text(method, event)
        event = _traces(None, method, event)
        try:
            text = _encoder.encode(event)
        except (ValueError, TypeError, RecursionError):  # no number, keys that are no text, a circle
            text = _encoder.encode({str(key): _plain(value) for key, value in event.items()})
        if len(text) > _LARGEST:
            kept = {name: event[name] for name in ("event", "service", "id", "level", "ts")}
            text = _encoder.encode({**kept, "too_long": len(text)})
        prefix = f"<{_JOURNAL_LEVELS.get(level, 6)}>" if self._has_priority else ""
        return f"{prefix}{text}\n".encode()

    def _text(self, method: str, event: MutableMapping[str, Any]) -> bytes:
        assert self._console is not None
        trace = structlog.processors.format_exc_info(None, method, dict(event)).get("exception")
        shown = {name: _fit(value) for name, value in event.items() if name not in ("exc_info", "exception")}
        text = str(self._console(None, method, shown))
        if trace:
            text += "\n" + printable(trace, keep="\n\t")
        return f"{text}\n".encode(errors="backslashreplace")

    def _own_line(self, name: str, fields: Mapping[str, Any]) -> bytes:
        return self._line("warning", {"event": name, **fields})

    # --- while the process runs ------------------------------------------------------------------

    def reconfigure(self, settings: LogSettings) -> None:
        """Level, bounds of the file and refusals a second become these; the file is opened anew."""
        self.level = settings.level
        self._sampler.max_per_s = settings.max_refusals_per_s
        sink = self._writer.sink
        if isinstance(sink, FileSink):
            sink.max_nbytes, sink.keep = settings.max_mb << 20, settings.keep
        self.install()
        self._writer.reopen()

    def reopen(self) -> None:
        """The file is opened anew with the next line."""
        self._writer.reopen()

    def capture(self) -> None:
        """What anybody in this process prints becomes events (capture.py), unless a person reads along."""
        if self._console is None:
            self._capture.begin()

    def flush(self, timeout_s: float = CLOSE_S) -> bool:
        """Wait until all lines are written, for at most that long; False if they are not."""
        return self._writer.flush(timeout_s)

    def close(self) -> None:
        """Write what is there, within ``CLOSE_S``. What is logged afterwards is dropped. Idempotent."""
        self._capture.end()
        self._writer.close(CLOSE_S)
        atexit.unregister(self.close)

    def install(self) -> None:
        """From now on structlog's loggers are this one's."""
        number = logging.getLevelNamesMapping().get(self.level.upper(), logging.INFO)
        structlog.configure(
            processors=[self.process],
            wrapper_class=structlog.make_filtering_bound_logger(number),
            cache_logger_on_first_use=False,
        )


_current: Log | None = None


def current() -> Log | None:
    """Of this process, if it has been configured."""
    return _current


def configure(service: str, service_id: str, settings: LogSettings | None = None) -> Log:
    """Set up logging for this process and put ``service`` and ``id`` into every line.

    JSON goes to ``log.file`` in ``log.dir`` if there is one, else to stderr (coloured text when that is a
    terminal). A file that cannot be had now is tried again with every line; one that never can be is a
    :class:`ConfigError`. The caller closes it.
    """
    global _current  # noqa: PLW0603
    settings = settings or LogSettings()
    sink, on_terminal = _make_sink(service, service_id, settings)
    made = _current = Log(service, service_id, sink, settings, on_terminal=on_terminal)
    structlog.contextvars.clear_contextvars()
    made.install()
    atexit.register(made.close)
    return made


def _make_sink(service: str, service_id: str, settings: LogSettings) -> tuple[Sink, bool]:
    if settings.dir:
        path = Path(settings.dir) / (settings.file or f"{service}-{service_id}.jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "ab"):
                pass
        except (PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError) as error:
            raise ConfigError(f"log.dir: {path}: {error.strerror}", field="log.dir") from None
        except OSError:
            pass  # a full disk, no descriptors: that passes
        return FileSink(path, max_nbytes=settings.max_mb << 20, keep=settings.keep), False
    if sys.stderr is None:
        return _Closed(), False
    try:
        return DescriptorSink(sys.stderr.fileno()), sys.stderr.isatty()
    except (OSError, ValueError):
        return TextSink(sys.stderr), False


class _Closed:
    """Nobody listens: the process was started without a stderr. Its lines are counted."""

    def write(self, data: bytes, *, at_line: bool) -> int:
        raise BrokenPipeError(32, "there is no stderr")

    def reopen(self) -> None:
        pass

    def close(self) -> None:
        pass


def say(text: str) -> None:
    """A last word on stderr, for people; lost where it would have to wait or cannot be said."""
    with contextlib.suppress(Exception):
        sink = DescriptorSink(2)
        if sink.is_ready():
            sink.write(f"{printable(text)}\n".encode(errors="backslashreplace"), at_line=True)


def _is_journal() -> bool:
    """stderr is what systemd has connected to its journal."""
    device, colon, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(2)
    except OSError:
        return False
    return bool(colon) and (device, inode) == (str(status.st_dev), str(status.st_ino))


def _plain(value: Any) -> Any:
    try:
        _encoder.encode(value)
    except (ValueError, TypeError, RecursionError):
        return repr(value)
    return value


def _fit(value: Any) -> Any:
    return value if isinstance(value, bool | int | float) else printable(value)
