"""What the commands print: nothing of it may command the terminal of who reads it.

Owns the only ways in which a command says something. Names, paths, errors and lines of logs come from clients
and from other machines; a control character among them is shown as an escape.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any

import click


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """A text of our own, which may have several lines, with whatever stands in it."""
    from microserve.protocol.logging.printable import printable

    click.echo(printable(text, keep="\n\t"), err=err, nl=nl)


STYLES: dict[str, dict[str, Any]] = {
    "dim": {"dim": True},
    "call": {"fg": "cyan"},
    "good": {"fg": "green"},
    "warn": {"fg": "yellow"},
    "bad": {"fg": "red", "bold": True},
    "": {},
}
JOINERS = "\u200c\u200d"
"""Zero width, and what an emoji of several, and Persian, are written with."""


def write(text: str, *, style: str = "") -> None:
    """A piece of a text as it comes, in a style of :data:`STYLES` on a terminal; no line is ended."""
    from microserve.protocol.logging.printable import printable

    plain = printable(text, keep=f"\n\t{JOINERS}")
    styled = STYLES[style] and not os.environ.get("NO_COLOR")
    click.echo(click.style(plain, **STYLES[style]) if styled else plain, nl=False)


def echo_cells(cells: Iterable[tuple[str, str]]) -> None:
    """One line of texts in styles of :data:`STYLES`, on a terminal."""
    for text, style in cells:
        write(printable_line(text), style=style)
    click.echo()


def printable_line(text: str) -> str:
    from microserve.protocol.logging.printable import printable

    return printable(text)


def markdown(text: str) -> None:
    """Drawn for this terminal. Links are shown, not made: where they lead is to be read."""
    from rich.console import Console
    from rich.markdown import Markdown

    from microserve.protocol.logging.printable import printable

    plain = printable(text, keep=f"\n\t{JOINERS}")
    Console(file=sys.stdout).print(Markdown(plain, hyperlinks=False))


class Failure(click.ClickException):
    """Exit code 1, and why."""

    def format_message(self) -> str:
        from microserve.protocol.logging.printable import printable

        return printable(self.message, keep="\n\t")
