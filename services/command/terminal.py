"""What the commands print: nothing of it may command the terminal of who reads it.

Owns the only ways in which a command says something. Names, paths, errors and lines of logs come from clients
and from other machines; a control character among them is shown as an escape.
"""

from __future__ import annotations

import click


def echo(text: object = "", *, err: bool = False, nl: bool = True) -> None:
    """A text of our own, which may have several lines, with whatever stands in it."""
    from microserve.protocol.logging.printable import printable

    click.echo(printable(text, keep="\n\t"), err=err, nl=nl)


class Failure(click.ClickException):
    """Exit code 1, and why."""

    def format_message(self) -> str:
        from microserve.protocol.logging.printable import printable

        return printable(self.message, keep="\n\t")
