"""One look at a mesh as plain text, or as JSON: what ``--once`` prints, and what a pipe gets.

Sans-I/O. The JSON has the names of ``/view``, and ``summary`` beside them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.protocol.logging.printable import printable
from microserve.services.command.top.column import Order, Row, Table, engine_rows, request_rows
from microserve.services.command.top.picture import Picture, Summary
from microserve.services.command.top.story import alarm_lines

NUM_REQUESTS = 10
RIGHT_MARGIN = 2


def summary_line(summary: Summary) -> str:
    return (
        f"req/s {summary.requests_per_s:.1f}  tok/s {summary.tokens_per_s:.0f}  "
        f"run {summary.running}  wait {summary.waiting}  KV {summary.kv_usage:.0%}  "
        f"hit {summary.hit_rate:.0%}  check {summary.check or 'none yet'}  alarms {summary.alarms}"
    )


def as_text(picture: Picture, url: str, now: float) -> str:
    """Header, engines, what is wrong, and the slowest of the last requests."""
    summary = picture.summary(now)
    version = picture.health.version if picture.health is not None else "-"
    lines = [
        f"{printable(url)}  {printable(version)}  rates of {summary.rate_s:.0f} s",
        summary_line(summary),
        "",
        *text_of(engine_rows(picture.engines.values(), Order())),
    ]
    if not picture.engines:
        lines.append("no engine is known" + ("" if picture.index_alive else ": the index is silent"))
    if summary.alarms:
        lines += ["", *alarm_lines(picture.health)]
    slowest = sorted(picture.requests(), key=lambda form: -form.wall_s)[:NUM_REQUESTS]
    if slowest:
        lines += ["", f"slowest of {len(picture.requests())} requests", *text_of(request_rows(slowest, None))]
    return "\n".join(lines)


def text_of(table: Table) -> list[str]:
    """Columns as wide as what is in them; columns in which there is nothing are left out."""
    rows = table.rows
    places = [each for each in range(len(table.titles)) if not rows or any(row.cells[each] for row in rows)]
    head = Row("", tuple(title.rstrip("↑↓") for title in table.titles))
    widths = {place: max(len(row.cells[place]) for row in [head, *table.rows]) for place in places}
    lines = []
    for row in [head, *rows]:
        cells = [
            f"{row.cells[place]:{'>' if table.numbers[place] else '<'}{widths[place]}}" for place in places
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def as_json(picture: Picture, url: str, now: float) -> dict[str, Any]:
    requests = picture.requests()
    made: dict[str, Any] = msgspec.to_builtins(
        {
            "at": picture.at,
            "url": url,
            "index_alive": picture.index_alive,
            "summary": picture.summary(now),
            "engines": list(picture.engines.values()),
            "running": [form for form in requests if not form.at],
            "ended": [form for form in requests if form.at],
            "health": picture.health,
        }
    )
    return made
