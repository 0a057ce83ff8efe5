"""Rows of what is in a picture, sorted and filtered: every table of ``top``, as text.

Sans-I/O. A cell is escaped here, so that nobody behind it has to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from microserve.gateway.view.forms import EngineForm, KeyForm, LoadForm, RequestForm
from microserve.protocol.logging.printable import printable
from microserve.services.command.shared.why import strategy_name, why_line

T = TypeVar("T")
MAX_CELL_CHARS = 160
NONE = "-"


@dataclass(frozen=True, slots=True)
class Column(Generic[T]):
    title: str
    text: Callable[[T], object]
    key: Callable[[T], Any] | None = None
    """What it is sorted by; None: its text."""
    is_number: bool = False
    """Flush right, and the highest first."""


@dataclass(frozen=True, slots=True)
class Row:
    id: str
    cells: tuple[str, ...]
    tone: str = ""
    """``good``, ``bad``, ``warn``, ``dim`` or nothing; never all that tells them apart."""


@dataclass(frozen=True, slots=True)
class Table:
    titles: tuple[str, ...]
    numbers: tuple[bool, ...]
    rows: list[Row]
    num_all: int
    """Before the filter and the bound."""


@dataclass(frozen=True, slots=True)
class Order:
    """By which column; a number's highest come first, a text's lowest; ``reverse``: the other way."""

    column: int = 0
    reverse: bool = False


def table_of(
    columns: Sequence[Column[T]],
    items: Iterable[tuple[str, T, str]],
    order: Order | None,
    needle: str = "",
    *,
    limit: int = 500,
) -> Table:
    """``items``: id, value and tone; ``order`` None: as they come; ``needle``: in any cell, whatever its
    case."""
    made = [
        (value, Row(name, tuple(_cell(column.text(value)) for column in columns), tone))
        for name, value, tone in items
    ]
    num_all = len(made)
    if needle:
        wanted = needle.casefold()
        made = [each for each in made if any(wanted in cell.casefold() for cell in each[1].cells)]
    if order is not None:
        place = order.column % len(columns)
        column = columns[place]
        key = column.key
        made.sort(
            key=lambda each: key(each[0]) if key is not None else each[1].cells[place],
            reverse=column.is_number != order.reverse,
        )
    titles = [column.title for column in columns]
    if order is not None:
        place = order.column % len(columns)
        titles[place] += "↓" if columns[place].is_number != order.reverse else "↑"
    return Table(
        tuple(titles),
        tuple(column.is_number for column in columns),
        [row for _, row in made[:limit]],
        num_all,
    )


def _cell(value: object) -> str:
    text = printable(value)
    return text if len(text) <= MAX_CELL_CHARS else f"{text[: MAX_CELL_CHARS - 3]}..."


# --- engines ---------------------------------------------------------------------------------------


def kv_usage(load: LoadForm) -> float:
    blocks = load.used_blocks + load.cached_blocks + load.free_blocks + load.quarantined_blocks
    return load.used_blocks / blocks if blocks else 0.0


def _load(title: str, value: Callable[[LoadForm], float], text: str = "{:.0f}") -> Column[EngineForm]:
    """Of an engine that is no member there is none, and it comes last."""
    return Column(
        title,
        lambda engine: NONE if engine.load is None else text.format(value(engine.load)),
        lambda engine: float("-inf") if engine.load is None else value(engine.load),
        is_number=True,
    )


ENGINES: tuple[Column[EngineForm], ...] = (
    Column("engine", lambda engine: engine.id),
    Column("state", lambda engine: engine.state),
    _load("run", lambda load: load.running),
    _load("wait", lambda load: load.waiting),
    _load("kv%", lambda load: 100 * kv_usage(load)),
    _load("used", lambda load: load.used_blocks),
    _load("cached", lambda load: load.cached_blocks),
    _load("free", lambda load: load.free_blocks),
    _load("grant", lambda load: load.granted_blocks),
    _load("quar", lambda load: load.quarantined_blocks),
    _load("lease", lambda load: load.oldest_lease_s, "{:.1f}"),
    _load("pre%", lambda load: 100 * load.prefill_share),
    _load("dec%", lambda load: 100 * load.decode_share),
    _load("kv-in%", lambda load: 100 * load.transfer_share),
    _load("idle%", lambda load: 100 * load.idle_share),
    _load("step ms", lambda load: 1000 * load.decode_step_s, "{:.1f}"),
    Column("host", lambda engine: engine.host or NONE),
    Column("class", lambda engine: engine.numerics or NONE),
    Column("labels", lambda engine: ",".join(engine.labels) or NONE),
    Column("detail", lambda engine: engine.detail),
)
ENGINE_TONES: Mapping[str, str] = {"ready": "good", "draining": "warn", "refused": "bad", "lost": "bad"}


def engine_rows(engines: Iterable[EngineForm], order: Order | None, needle: str = "") -> Table:
    items = ((engine.id, engine, ENGINE_TONES.get(engine.state, "")) for engine in engines)
    return table_of(ENGINES, items, order, needle)


# --- requests --------------------------------------------------------------------------------------


def state_of(form: RequestForm) -> str:
    """How it ended: its finish reason, or the error's code."""
    if not form.at:
        return "runs"
    return form.code or form.finish_reason or (f"HTTP {form.status}" if form.status else "gone")


def tpot_s(form: RequestForm) -> float | None:
    """Seconds for each output token after the first."""
    if form.ttft_s is None or form.output_tokens < 2:
        return None
    return (form.wall_s - form.ttft_s) / (form.output_tokens - 1)


def _ms(title: str, value: Callable[[RequestForm], float | None]) -> Column[RequestForm]:
    return Column(
        title,
        lambda form: NONE if (seconds := value(form)) is None else f"{seconds * 1000:.1f}",
        lambda form: float("-inf") if (seconds := value(form)) is None else seconds,
        is_number=True,
    )


def _count(title: str, value: Callable[[RequestForm], int]) -> Column[RequestForm]:
    return Column(title, value, value, is_number=True)


REQUESTS: tuple[Column[RequestForm], ...] = (
    Column("request", lambda form: form.id or form.http_id),
    Column("state", state_of),
    _ms("wall ms", lambda form: form.wall_s),
    _ms("ttft ms", lambda form: form.ttft_s),
    _ms("tpot ms", tpot_s),
    _count("in", lambda form: form.prompt_tokens),
    _count("cached", lambda form: form.cached_tokens),
    _count("out", lambda form: form.output_tokens),
    Column("engines", lambda form: "→".join(form.engines) or NONE),
    Column("strategy", lambda form: strategy_name(form.strategy, form.strategy_version, form.share)),
    Column("why", lambda form: why_line(form.why, alone=form.alone, moves=form.moves)),
    Column("key", lambda form: form.key or NONE),
    Column("model", lambda form: form.model or NONE),
)


def request_rows(forms: Iterable[RequestForm], order: Order | None, needle: str = "") -> Table:
    items = ((form.id or form.http_id, form, _request_tone(form)) for form in forms)
    return table_of(REQUESTS, items, order, needle)


def _request_tone(form: RequestForm) -> str:
    if not form.at:
        return "good"
    return "bad" if form.code or form.status >= 400 else ""


# --- keys and strategies ---------------------------------------------------------------------------

KEYS: tuple[Column[KeyForm], ...] = (
    Column("key", lambda key: key.name),
    Column("requests", lambda key: key.requests, lambda key: key.requests, is_number=True),
    Column("refused", lambda key: key.refused, lambda key: key.refused, is_number=True),
    Column("streams", lambda key: key.streams, lambda key: key.streams, is_number=True),
    Column("in", lambda key: key.prompt_tokens, lambda key: key.prompt_tokens, is_number=True),
    Column("cached", lambda key: key.cached_tokens, lambda key: key.cached_tokens, is_number=True),
    Column("out", lambda key: key.output_tokens, lambda key: key.output_tokens, is_number=True),
    Column("today", lambda key: key.tokens_today, lambda key: key.tokens_today, is_number=True),
    Column("a day", lambda key: key.tokens_per_day or NONE, lambda key: key.tokens_per_day, is_number=True),
    Column("operator", lambda key: "yes" if key.operator else ""),
)


def key_rows(keys: Iterable[KeyForm], order: Order | None, needle: str = "") -> Table:
    items = ((key.name, key, "warn" if key.refused else "") for key in keys)
    return table_of(KEYS, items, order, needle)


def _version(kind: str) -> Callable[[Mapping[str, Any]], str]:
    def text(entry: Mapping[str, Any]) -> str:
        version = entry.get(kind)
        return NONE if not version else str(version.get("version") or "own")

    return text


def _share(name: str) -> Callable[[Mapping[str, Any]], float]:
    return lambda entry: float(entry.get(name) or 0.0)


def _parameters(entry: Mapping[str, Any]) -> str:
    stable = entry.get("stable") or {}
    return " ".join(f"{name}={value}" for name, value in (stable.get("parameters") or {}).items())


STRATEGIES: tuple[Column[Mapping[str, Any]], ...] = (
    Column("strategy", lambda entry: entry.get("strategy", NONE)),
    Column("stable", _version("stable")),
    Column("canary", _version("canary")),
    Column("share %", lambda entry: f"{_share('share')(entry):.1%}", _share("share"), is_number=True),
    Column("shadow", _version("shadow")),
    Column("parameters", _parameters),
)


def strategy_rows(entries: Iterable[Mapping[str, Any]], order: Order | None, needle: str = "") -> Table:
    items = (
        (str(entry.get("strategy", "")), entry, "warn" if entry.get("canary") else "") for entry in entries
    )
    return table_of(STRATEGIES, items, order, needle)
