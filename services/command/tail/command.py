"""``microserve tail``: what happened to requests, and what happened, across all services.

Owns what is shown and how a line looks; where lines come from is event_log.py's. A request is one line, the
gateway's canonical one; the other services' lines about requests are shown on demand (``--request``,
``--service``). Every line that is not understood is still shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from microserve.protocol import log
from microserve.protocol.logging.printable import printable, printable_json
from microserve.protocol.messages.router import PHASES
from microserve.protocol.request_id import is_named
from microserve.services.command.shared.flags import directory_at_hand
from microserve.services.command.shared.why import strategy_name, why_line
from microserve.services.command.tail.columns import Cells, event_cells, header, request_cells
from microserve.services.local.directory import MeshDirectory
from microserve.services.local.event_log import Event, EventLog, JournalLog

FOLLOW_INTERVAL_S = 0.2

TOKENS = (
    ("prompt_tokens", "in"),
    ("cached_tokens", "cached"),
    ("received_tokens", "received"),
    ("output_tokens", "out"),
)

CANONICAL = (log.REQUEST_FINISHED, "gateway")

FIELDS = ("key", "strategy", "engine", "code", "status", "path", "model")
"""By which requests can be chosen."""

_HIDDEN = frozenset({"ts", "event", "service", "id", "level", "exception"})
_QUIET_PREFIXES = ("request.", "grant.", "kv.")
"""Events of single requests, which the default view leaves to the canonical line."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which events to show; no field given: canonical lines and whatever happened to services."""

    request_id: str | None = None
    """This request with its choices and moves, in every service: its id on the bus, in ``x-request-id`` or in
    the body of the response."""
    service: str | None = None
    slow_s: float | None = None
    """Only requests whose canonical ``wall_s`` is at least this."""
    fields: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Only requests that have one of these values in each of these :data:`FIELDS`."""

    def admits(self, event: Event) -> bool:
        if self.service is not None and event["service"] != self.service:
            return False
        if self.request_id is not None and not _concerns(event, self.request_id):
            return False
        canonical = (event["event"], event["service"]) == CANONICAL
        if self.slow_s is not None or self.fields:
            is_slow = _number(event, "wall_s") >= (self.slow_s or 0.0)
            return canonical and is_slow and all(_has(event, *each) for each in self.fields.items())
        if self.request_id is not None or self.service is not None or canonical:
            return True
        trouble = event.get("level") in ("warning", "error", "critical")
        return trouble or not str(event["event"]).startswith(_QUIET_PREFIXES)


def fields_of(texts: Sequence[str]) -> dict[str, list[str]]:
    """``FIELD=VALUE`` each; of one field any of its values. Raises :class:`ValueError`."""
    found: dict[str, list[str]] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name not in FIELDS:
            raise ValueError(f"--filter {text!r} is not FIELD=VALUE; fields: {', '.join(FIELDS)}")
        found.setdefault(name, []).append(value)
    return found


def _has(event: Event, name: str, values: Sequence[str]) -> bool:
    if name == "engine":
        return any(each in values for each in map(str, event.get("engines") or []))
    value = str(event.get(name) or "")
    # 5xx: all of them
    return value in values or (name == "status" and f"{value[:1]}xx" in values)


def mesh_logs() -> Path:
    """Where the mesh of the directory at hand has its logs, running or not."""
    mesh = MeshDirectory(directory_at_hand())
    state = mesh.read()
    return Path(state.children[0].log).parent if state and state.children else mesh.logs


def show(
    directory: Path | None,
    chosen: Filter,
    *,
    follow: bool,
    as_json: bool,
    with_why: bool = False,
    echo: Callable[[str], Any],
    echo_cells: Callable[[Cells], Any] | None = None,
    width: int = 0,
    wait: Callable[[float], Any] = time.sleep,
) -> None:
    """Echo the chosen events line by line; with ``follow`` it ends only by an exception (Ctrl-C).

    ``directory`` None: those of the systemd journal; then it raises :class:`Unreadable`, if that cannot
    be. ``with_why``: also how engines were chosen. ``echo_cells``: there is a terminal of ``width``
    cells, and lines are columns."""
    in_columns = echo_cells is not None and not as_json
    if echo_cells is not None and in_columns:
        echo_cells(header())
    events = JournalLog(follow=follow) if directory is None else EventLog(directory)
    try:
        while True:
            for event in events.read():
                if echo_cells is not None and in_columns and chosen.admits(event):
                    echo_cells(_cells(event, 0 if with_why else width))
                elif chosen.admits(event):
                    # An event is a line, whatever stands in it.
                    echo(
                        printable_json(event)
                        if as_json
                        else printable(format_event(event, with_why=with_why))
                    )
            if not follow:
                return
            wait(FOLLOW_INTERVAL_S)
    finally:
        events.close()


def _cells(event: Event, width: int) -> Cells:
    if (event["event"], event["service"]) == CANONICAL:
        return request_cells(event, width=width)
    return event_cells(event, format_event(event))


def format_event(event: Event, *, with_why: bool = False) -> str:
    """One line for people."""
    if (event["event"], event["service"]) == CANONICAL:
        return _format_request(event, with_why)
    service, service_id = str(event["service"]), str(event["id"])
    who = service_id if service_id.startswith(service) else f"{service}/{service_id}".rstrip("/")
    if not event["event"]:
        return f"{_clock(event)} {who:<14} | {event.get('text', '')}"
    fields = " ".join(f"{name}={_text(value)}" for name, value in event.items() if name not in _HIDDEN)
    level = event.get("level", "info")
    mark = "" if level in ("info", "debug") else f" [{level}]"
    return f"{_clock(event)} {who:<14} {event['event']}{mark} {fields}".rstrip()


def _format_request(event: Event, with_why: bool) -> str:
    """``12:00:01.234 cmpl-1 | SmolLM2 | auto e1→e0 | in=512 ... | queued 0.1 ... = 90 ms | ... | stop``."""
    engines = "→".join(map(str, event.get("engines") or [])) or "-"
    tokens = " ".join(f"{short}={event[name]}" for name, short in TOKENS if name in event)
    phases = " ".join(f"{name} {_ms(event, f'{name}_s')}" for name in PHASES if f"{name}_s" in event)
    ends = [str(event[name]) for name in ("finish_reason", "code") if event.get(name)]
    if _number(event, "status") >= 400:
        ends.append(f"HTTP {event['status']}")
    parts = [
        f"{_clock(event)} {event.get('request_id') or event.get('http_request_id', '-')}",
        str(event.get("model") or "-"),
        f"{_strategy(event)} {engines}",
        f"why {_why(event)}" if with_why else "",
        tokens,
        f"{phases} = {_ms(event, 'wall_s')} ms" if phases else f"{_ms(event, 'wall_s')} ms",
        f"ttft {_ms(event, 'ttft_s')} ms" if event.get("ttft_s") is not None else "no token",
        " ".join(ends),
    ]
    return " | ".join(filter(None, parts))


def _strategy(event: Event) -> str:
    version = int(_number(event, "strategy_version"))
    return strategy_name(str(event.get("strategy") or ""), version, str(event.get("share") or ""))


def _why(event: Event) -> str:
    alone, moves = str(event.get("alone") or ""), int(_number(event, "moves"))
    return why_line(str(event.get("why") or ""), alone=alone, moves=moves)


def _concerns(event: Event, wanted: str) -> bool:
    named = is_named(str(event.get("request_id", "")), wanted)
    return named or str(event.get("http_request_id", "")) == wanted


def _number(event: Event, name: str) -> float:
    value = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _ms(event: Event, name: str) -> str:
    return f"{_number(event, name) * 1000:.1f}"


def _clock(event: Event) -> str:
    return datetime.fromtimestamp(event["ts"]).strftime("%H:%M:%S.%f")[:-3]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value and not any(each in value for each in ' \n\t"='):
        return value
    return msgspec.json.encode(value).decode()
