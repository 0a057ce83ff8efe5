"""Where one is in ``top``, and what a word after ``:`` means. Sans-I/O."""

from __future__ import annotations

from dataclasses import dataclass, replace
from difflib import get_close_matches

from microserve.services.command.top.column import ENGINES, KEYS, REQUESTS, STRATEGIES, Order

MESH, REQUESTS_OF, STRATEGIES_OF, KEYS_OF, HEALTH = VIEWS = "mesh", "requests", "strategies", "keys", "health"
REQUEST, ENGINE, HELP = "request", "engine", "help"
QUIT = "quit"
COMMANDS = (*VIEWS, "help", QUIT)
SHORT = {"q": QUIT, "q!": QUIT, "engines": MESH, "req": REQUESTS_OF, "st": STRATEGIES_OF, "?": HELP}
NUM_COLUMNS = {
    MESH: len(ENGINES),
    REQUESTS_OF: len(REQUESTS),
    KEYS_OF: len(KEYS),
    STRATEGIES_OF: len(STRATEGIES),
}
"""Of places that are tables."""

HELP_LINES = (
    "/ TEXT      only rows with TEXT in them; an empty one: all",
    ": COMMAND   mesh, requests, strategies, keys, health, help, quit",
    "Enter       what is behind a row: an engine's requests, a request taken apart",
    "d           describe the row: an engine, or a request",
    "s, S        sort by the next column; the other way round",
    "Space       freeze what is shown, and go on",
    "Esc         back",
    "?           these keys",
    "q           quit",
)


@dataclass(frozen=True, slots=True)
class Place:
    kind: str = MESH
    subject: str = ""
    """Of ``requests`` an engine, or nothing; of ``request`` and ``engine`` its id."""
    order: Order | None = None
    """None: as it comes."""
    needle: str = ""

    @property
    def is_table(self) -> bool:
        return self.kind in NUM_COLUMNS

    @property
    def title(self) -> str:
        return f"{self.kind} {self.subject}".rstrip() + (f"  /{self.needle}" if self.needle else "")


class Way:
    """The places that one came through; the last is where one is."""

    def __init__(self) -> None:
        self._places = [Place(order=Order())]

    @property
    def place(self) -> Place:
        return self._places[-1]

    @property
    def depth(self) -> int:
        return len(self._places)

    def enter(self, kind: str, subject: str = "") -> None:
        if kind == self.place.kind and subject == self.place.subject:
            return
        if kind in VIEWS and not subject:  # one begins anew
            self._places = [Place(order=Order())] if kind != MESH else []
        self._places.append(Place(kind, subject, Order() if kind == MESH else None))

    def back(self) -> None:
        """The filter goes first."""
        if self.place.needle:
            self.filter("")
        elif len(self._places) > 1:
            self._places.pop()

    def filter(self, needle: str) -> None:
        self._places[-1] = replace(self.place, needle=needle)

    def sort(self) -> None:
        """By the next column; behind the last one as it comes."""
        place = self.place
        if not place.is_table:
            return
        at = -1 if place.order is None else place.order.column
        order = Order(at + 1) if at + 1 < NUM_COLUMNS[place.kind] else None
        self._places[-1] = replace(place, order=order)

    def reverse(self) -> None:
        order = self.place.order
        if self.place.is_table:
            self._places[-1] = replace(
                self.place,
                order=Order(reverse=True) if order is None else replace(order, reverse=not order.reverse),
            )


def command_of(text: str) -> str:
    """One of :data:`COMMANDS`, by its beginning or a short name. Raises :class:`ValueError` that says what
    there is."""
    word = text.strip().lower()
    word = SHORT.get(word, word)
    starting = [each for each in COMMANDS if word and each.startswith(word)]
    if word in COMMANDS:
        return word
    if len(starting) == 1:
        return starting[0]
    near = get_close_matches(word, COMMANDS, n=1)
    meant = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"no command {word[:40]!r}{meant} There are: {', '.join(COMMANDS)}")
