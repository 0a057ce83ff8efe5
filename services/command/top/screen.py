"""The terminal: keys, a table or lines, and a header that is always there.

Owns textual, and is the only one that knows it. What is shown is made by column.py and story.py; NO_COLOR is
textual's own to heed.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import ClassVar
from urllib.parse import quote

from rich.text import Text
from textual import events, work
from textual.app import App, ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.widgets import DataTable, Input, Static

from microserve.gateway.view.forms import KeyForm, KeysForm, RequestDetail, StrategiesForm
from microserve.protocol.logging.printable import printable
from microserve.services.command.client.endpoint import Endpoint
from microserve.services.command.top import place as places
from microserve.services.command.top.column import (
    Table,
    engine_rows,
    key_rows,
    request_rows,
    strategy_rows,
)
from microserve.services.command.top.link import Link, Unseen
from microserve.services.command.top.picture import Picture
from microserve.services.command.top.place import Place, Way, command_of
from microserve.services.command.top.plain import summary_line
from microserve.services.command.top.story import engine_lines, health_lines, request_lines

STYLES = {"good": "green", "bad": "bold red", "warn": "yellow", "dim": "dim"}
STALE_S = 3.0
HINTS = "/ filter  : command  Enter open  d describe  s sort  Space freeze  Esc  ? keys"


class Top(App[None]):
    CSS = """
    Screen { layout: vertical; }
    #header { height: 2; }
    #where { height: 1; }
    #table { height: 1fr; }
    #lines { height: 1fr; display: none; }
    #prompt { height: 1; border: none; display: none; padding: 0; }
    #hints { height: 1; }
    """
    ENABLE_COMMAND_PALETTE = False
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("slash", "ask('/')", "filter"),
        Binding("colon", "ask(':')", "command"),
        Binding("question_mark", "help", "keys"),
        Binding("d", "describe", "describe"),
        Binding("s", "sort", "sort"),
        Binding("S", "reverse", "reverse"),
        Binding("space", "freeze", "freeze"),
        Binding("escape", "back", "back"),
        Binding("q", "quit", "quit"),
    ]

    def __init__(
        self, endpoint: Endpoint, picture: Picture | None = None, *, interval_s: float = 1.0
    ) -> None:
        super().__init__()
        self._endpoint, self._interval_s = endpoint, interval_s
        self.picture = picture or Picture()
        self.way = Way()
        self.is_frozen = False
        self._link: Link | None = None
        self._lost = ""
        self._said = ""
        """Of a command that is none, say; until the next key."""
        self._asking = "/"
        self._keys: Sequence[KeyForm] = ()
        self._strategies: StrategiesForm | None = None
        self._detail: RequestDetail | None = None
        self._titles: tuple[str, ...] = ()

    def compose(self) -> ComposeResult:
        yield Static(id="header", markup=False)
        yield Static(id="where", markup=False)
        yield DataTable(id="table", cursor_type="row", zebra_stripes=False)
        with VerticalScroll(id="lines"):
            yield Static(id="text", markup=False)
        yield Input(id="prompt", select_on_focus=False)
        yield Static(HINTS, id="hints", markup=False)

    def on_mount(self) -> None:
        self._link = Link(self._endpoint)
        self._table.focus()
        self._follow()
        self.set_interval(self._interval_s, self._tick)
        self._draw()

    async def on_unmount(self) -> None:
        if self._link is not None:
            await self._link.close()

    # --- what is heard -------------------------------------------------------------------------------

    @work(group="feed")
    async def _follow(self) -> None:
        assert self._link is not None
        await self._link.follow(self._take, self._lose)

    def _take(self, event: bytes) -> None:
        was_new = not self.picture.at
        self.picture.take(event, time.monotonic())
        if self._lost or was_new:
            self._lost = ""
            self._draw()

    def _lose(self, reason: str) -> None:
        self._lost = reason
        self._draw()

    @work(exclusive=True, group="asked")
    async def _ask(self) -> None:
        """What the feed has not, for the place that one is in."""
        link, place = self._link, self.way.place
        assert link is not None
        try:
            if place.kind == places.KEYS_OF:
                self._keys = (await link.get("keys", KeysForm)).keys
            elif place.kind == places.STRATEGIES_OF:
                self._strategies = await link.get("strategies", StrategiesForm)
            elif place.kind == places.REQUEST:
                path = f"requests/{quote(place.subject, safe='')}"
                self._detail = await link.get(path, RequestDetail)
            else:
                return
        except Unseen as error:
            self._said = str(error)
        self._draw()

    def _tick(self) -> None:
        if self.is_frozen:
            return
        place, detail = self.way.place, self._detail
        over = (
            place.kind == places.REQUEST
            and detail is not None
            and not (detail.request and not detail.request.at)
        )
        if not over:
            self._ask()
        self._draw()

    # --- what is shown -------------------------------------------------------------------------------

    @property
    def _table(self) -> DataTable[Text]:
        return self.query_one("#table", DataTable)

    def _draw(self, *, whole: bool = False) -> None:
        """``whole``: one is somewhere else than before, so also while it is frozen."""
        if not self.is_running:
            return
        self._draw_head()
        if self.is_frozen and not whole:
            return
        place = self.way.place
        self._table.display = place.is_table
        lines = self.query_one("#lines")
        lines.display = not place.is_table
        if place.is_table:
            self._draw_table(self._rows(place))
        else:
            found = self._lines(place)
            wanted = [line for line in found if place.needle.casefold() in line.casefold()]
            self.query_one("#text", Static).update(Text("\n".join(wanted)))

    def _draw_head(self) -> None:
        now, picture = time.monotonic(), self.picture
        summary = picture.summary(now)
        version = picture.health.version if picture.health is not None else ""
        first = Text(f"microserve {printable(version)}  {printable(self._endpoint.url)}", style="bold")
        if self.is_frozen:
            first.append("  FROZEN", style="bold yellow")
        if self._lost or now - picture.heard_at > STALE_S:
            reason = printable(self._lost.partition("\n")[0])
            first.append(f"  STALE {now - picture.heard_at:.0f} s  {reason}", style="bold red")
        elif picture.at and not picture.index_alive:
            first.append("  the index is silent", style="bold red")
        second = Text(summary_line(summary))
        if summary.alarms and picture.health is not None:
            second.stylize("bold red", second.plain.rindex("alarms"))
        self.query_one("#header", Static).update(Text("\n").join([first, second]))
        self.query_one("#where", Static).update(
            Text(self._said.replace("\n", "  "), style="bold yellow")
            if self._said
            else Text(printable(self.way.place.title), style="reverse")
        )

    def _rows(self, place: Place) -> Table:
        if place.kind == places.MESH:
            return engine_rows(self.picture.engines.values(), place.order, place.needle)
        if place.kind == places.REQUESTS_OF:
            return request_rows(self.picture.requests(place.subject), place.order, place.needle)
        if place.kind == places.KEYS_OF:
            return key_rows(self._keys, place.order, place.needle)
        entries = self._strategies.entries if self._strategies is not None else []
        return strategy_rows(entries, place.order, place.needle)

    def _lines(self, place: Place) -> Sequence[str]:
        if place.kind == places.HEALTH:
            return health_lines(self.picture.health)
        if place.kind == places.REQUEST:
            return request_lines(self._detail) if self._detail is not None else ["asking ..."]
        if place.kind == places.ENGINE:
            engine = self.picture.engines.get(place.subject)
            return engine_lines(engine) if engine is not None else ["it is no member any more"]
        return places.HELP_LINES

    def _draw_table(self, made: Table) -> None:
        table = self._table
        if made.titles != self._titles:
            table.clear(columns=True)
            for title, is_number in zip(made.titles, made.numbers, strict=True):
                table.add_column(Text(title, justify="right" if is_number else "left"))
            self._titles = made.titles
        at, was = table.cursor_row, self.row_id
        scroll_x, scroll_y = table.scroll_x, table.scroll_y
        table.clear()
        seen: set[str] = set()
        for row in made.rows:
            if row.id in seen:  # two choices that were refused before they had an id
                continue
            seen.add(row.id)
            table.add_row(
                *(
                    Text(cell, style=STYLES.get(row.tone, ""), justify="right" if is_number else "left")
                    for cell, is_number in zip(row.cells, made.numbers, strict=True)
                ),
                key=row.id,
            )
        if was in seen:
            at = table.get_row_index(was)
        table.move_cursor(row=min(at, max(0, len(seen) - 1)), scroll=False)
        table.scroll_to(scroll_x, scroll_y, animate=False, force=True)

    @property
    def row_id(self) -> str:
        """Of the row at the cursor; empty: there is none."""
        table = self._table
        if not table.row_count or not 0 <= table.cursor_row < table.row_count:
            return ""
        return str(table.coordinate_to_cell_key((table.cursor_row, 0)).row_key.value or "")  # type: ignore[arg-type]

    # --- keys ----------------------------------------------------------------------------------------

    def on_key(self, event: events.Key) -> None:
        self._said = ""

    def on_data_table_row_selected(self, event: DataTable.RowSelected) -> None:
        name, kind = self.row_id, self.way.place.kind
        if name and kind == places.MESH:
            self._enter(places.REQUESTS_OF, name)
        elif name and kind == places.REQUESTS_OF:
            self._enter(places.REQUEST, name)

    def action_describe(self) -> None:
        name, kind = self.row_id, self.way.place.kind
        if name and kind == places.MESH:
            self._enter(places.ENGINE, name)
        elif name and kind == places.REQUESTS_OF:
            self._enter(places.REQUEST, name)
        elif kind == places.REQUESTS_OF and self.way.place.subject:
            self._enter(places.ENGINE, self.way.place.subject)

    def _enter(self, kind: str, subject: str = "") -> None:
        self._detail = None
        self.way.enter(kind, subject)
        self._arrive()

    def _arrive(self) -> None:
        self._draw(whole=True)
        (self._table if self.way.place.is_table else self.query_one("#lines")).focus()
        self._ask()

    def action_help(self) -> None:
        self._enter(places.HELP)

    def action_sort(self) -> None:
        self.way.sort()
        self._draw(whole=True)

    def action_reverse(self) -> None:
        self.way.reverse()
        self._draw(whole=True)

    def action_freeze(self) -> None:
        self.is_frozen = not self.is_frozen
        self._draw()

    async def action_back(self) -> None:
        prompt = self.query_one("#prompt", Input)
        if prompt.display:
            if self._asking == "/":
                self.way.filter("")
            self._close_prompt()
        else:
            self.way.back()
        self._arrive()

    def action_ask(self, what: str) -> None:
        self._asking = what
        prompt = self.query_one("#prompt", Input)
        prompt.value = self.way.place.needle if what == "/" else ""
        prompt.placeholder = "only rows with ..." if what == "/" else " ".join(places.COMMANDS)
        prompt.display = True
        self.query_one("#hints").display = False
        prompt.focus()

    def on_input_changed(self, event: Input.Changed) -> None:
        if self._asking == "/" and event.input.display:
            self.way.filter(event.value)
            self._draw(whole=True)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        text = event.value
        self._close_prompt()
        if self._asking == ":":
            try:
                command = command_of(text)
            except ValueError as error:
                self._said = printable(error) if text.strip() else ""
            else:
                if command == places.QUIT:
                    self.exit()
                    return
                self._enter(command)
        self._arrive()

    def _close_prompt(self) -> None:
        self.query_one("#prompt").display = False
        self.query_one("#hints").display = True
