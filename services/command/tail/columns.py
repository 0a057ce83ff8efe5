"""Lines of ``microserve tail`` on a terminal: columns, and what is wrong in a colour and in a word.

Pure: a line is cells with styles of ../shared/terminal.py. Off a terminal, command.py's plain lines are
what is printed.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from microserve.services.command.shared.why import strategy_name, why_line
from microserve.services.local.event_log import Event

Cells = Sequence[tuple[str, str]]
"""Text and style."""

WIDTHS = {
    "time": 12,
    "request": 26,
    "in": 6,
    "cached": 6,
    "out": 5,
    "queue ms": 8,
    "ttft ms": 8,
    "tpot ms": 7,
    "wall ms": 9,
    "end": 12,
    "engines": 10,
    "strategy": 14,
}
NUMBERS = frozenset({"in", "cached", "out", "queue ms", "ttft ms", "tpot ms", "wall ms"})
QUEUES = ("queued_s", "routed_s", "granted_s", "admitted_s")
"""Phases in which a request waits for its turn."""
LEVELS = {"warning": "warn", "error": "bad", "critical": "bad"}


def header() -> Cells:
    cells = [f"{name:>{width}}" if name in NUMBERS else f"{name:<{width}}" for name, width in WIDTHS.items()]
    return [("  ".join([*cells, "why"]), "dim")]


def request_cells(event: Event, *, width: int = 0) -> Cells:
    """A canonical line; what does not fit into ``width`` cells of *why* is cut, 0: nothing is."""
    is_bad = bool(event.get("code")) or _number(event, "status") >= 400
    ttft_s, output = event.get("ttft_s"), int(_number(event, "output_tokens"))
    decoding_s = _number(event, "wall_s") - _number(event, "ttft_s")
    texts = {
        "time": datetime.fromtimestamp(_number(event, "ts")).strftime("%H:%M:%S.%f")[:-3],
        "request": str(event.get("request_id") or event.get("http_request_id") or "-"),
        "in": f"{_number(event, 'prompt_tokens'):.0f}",
        "cached": f"{_number(event, 'cached_tokens'):.0f}",
        "out": str(output),
        "queue ms": _ms(sum(_number(event, name) for name in QUEUES)),
        "ttft ms": "-" if ttft_s is None else _ms(_number(event, "ttft_s")),
        "tpot ms": "-" if ttft_s is None or output < 2 else _ms(decoding_s / (output - 1)),
        "wall ms": _ms(_number(event, "wall_s")),
        "end": _end(event),
        "engines": "→".join(map(str, event.get("engines") or [])) or "-",
        "strategy": strategy_name(
            str(event.get("strategy") or ""),
            int(_number(event, "strategy_version")),
            str(event.get("share") or ""),
        ),
    }
    why = why_line(
        str(event.get("why") or ""), alone=str(event.get("alone") or ""), moves=int(_number(event, "moves"))
    )
    cells: list[tuple[str, str]] = []
    used = 0
    for name, text in texts.items():
        cell = f"{text:>{WIDTHS[name]}}" if name in NUMBERS else f"{text:<{WIDTHS[name]}}"
        cells.append((f"{cell}  ", _style(name, event, is_bad)))
        used += len(cell) + 2
    if width and used + len(why) > width:
        why = f"{why[: max(0, width - used - 1)]}…" if width - used > 8 else ""
    return [*cells, (why, "dim")]


def event_cells(event: Event, line: str) -> Cells:
    """Any other event; ``line``: what it says."""
    return [(line, LEVELS.get(str(event.get("level")), ""))]


def _end(event: Event) -> str:
    ends = [str(event[name]) for name in ("finish_reason", "code") if event.get(name)]
    if not event.get("code") and _number(event, "status") >= 400:
        ends.append(f"HTTP {event['status']}")
    return " ".join(ends) or "-"


def _style(name: str, event: Event, is_bad: bool) -> str:
    if name == "end":
        return "bad" if is_bad else "good"
    if name == "time":
        return "dim"
    return "warn" if name == "strategy" and event.get("share") == "canary" else ""


def _number(event: Event, name: str) -> float:
    value = event.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f}"
