"""What is typed: something to say, or an order that begins with a slash. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches

ORDERS = {
    "help": ("", "this"),
    "model": ("[NAME]", "the models there are; NAME: ask this one"),
    "system": ("[TEXT|-]", "the system message; TEXT: another one; -: none"),
    "strategy": ("[NAME|-]", "how the mesh is to serve (x-microserve-strategy); -: as it likes"),
    "temperature": ("[NUMBER|-]", "0 is greedy; -: the model's own"),
    "max_tokens": ("[NUMBER|-]", "of an answer; -: as many as fit"),
    "clear": ("", "forget what was said"),
    "undo": ("", "take the last question and its answer back"),
    "retry": ("", "ask the last question again"),
    "save": ("FILE", "write the conversation"),
    "load": ("FILE", "go on with one that was saved"),
    "tokens": ("", "how many there were"),
    "markdown": ("", "draw answers, block by block, or show them as they come"),
    "quit": ("", "end; so does Ctrl-D"),
}
"""Name, arguments, what it does."""

NONE = "-"
"""Argument that takes a wish back."""


@dataclass(frozen=True, slots=True)
class Order:
    name: str
    argument: str = ""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Begins with a slash and is no order."""

    name: str
    meant: str = ""


def parse(text: str) -> Order | Unknown | str:
    """Two slashes at the beginning are one that is said."""
    if not text.startswith("/"):
        return text
    if text.startswith("//"):
        return text[1:]
    name, _, argument = text[1:].partition(" ")
    name, argument = name.strip().lower(), argument.strip()
    if name in ORDERS:
        return Order(name, argument)
    beginnings = [each for each in ORDERS if name and each.startswith(name)]
    if len(beginnings) == 1:
        return Order(beginnings[0], argument)
    near = get_close_matches(name, ORDERS, n=1)
    return Unknown(name, near[0] if near else "")


def help_lines() -> list[str]:
    lines = [f"/{name} {arguments}".ljust(24) + meaning for name, (arguments, meaning) in ORDERS.items()]
    return [
        *lines,
        "A line that ends with \\ goes on in the next one. A text of several lines is one that is pasted, or",
        'that stands between two """. Ctrl-C ends an answer, and what came of it stays. //text says /text.',
    ]
