"""How ``microserve up`` and ``ps`` show a mesh: a living tree, plain lines off a terminal, or JSON lines.

Owns the screen, and is the only one that knows rich; is told what happens and decides nothing.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol, TextIO, cast

import msgspec
from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text
from rich.tree import Tree

from microserve.protocol.logging.printable import printable as shown
from microserve.protocol.logging.printable import printable_json
from microserve.services.local.demo.request import Answer
from microserve.services.local.directory import ChildState, MeshState

SYMBOLS = {"ready": "●", "failed": "✗", "stopped": "○"}
COLOURS = {"ready": "green", "failed": "red", "stopped": "dim", "restarting": "yellow", "stopping": "yellow"}


class View(Protocol):
    """What can be shown. Calls come from one thread, in the order of events."""

    def progress(self, what: str, part: float | None) -> None:
        """The demo model is being made; ``part`` is in [0, 1]."""
        ...

    def mesh(self, state: MeshState) -> None:
        """A child's state has changed."""
        ...

    def asked(self, prompt: str) -> None: ...
    def piece(self, text: str) -> None:
        """The next piece of the demo's answer."""
        ...

    def answered(self, answer: Answer) -> None: ...
    def note(self, text: str) -> None: ...
    def problem(self, text: str) -> None: ...
    def close(self) -> None: ...


def make_view(*, as_json: bool, stderr: bool = False) -> View:
    """``stderr``: leave stdout to what scripts read."""
    out = sys.stderr if stderr else sys.stdout
    if as_json:
        return cast(View, _Unheard(JsonView(out)))
    return cast(View, _Unheard(RichView(out) if out.isatty() else PlainView(out)))


class _Unheard:
    """A view whose reader may leave: a closed pipe or terminal is no reason to end what it shows."""

    def __init__(self, view: View) -> None:
        self._view = view

    def __getattr__(self, name: str) -> Callable[..., None]:
        tell = getattr(self._view, name)

        def call(*arguments: Any) -> None:
            with contextlib.suppress(OSError, ValueError):
                tell(*arguments)

        return call


class RichView:
    """Redraws the tree until all are ready; later changes are printed below, line by line."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._settled = False
        self._shown: dict[str, tuple[str, int, str]] = {}

    def progress(self, what: str, part: float | None) -> None:
        if self._bar is None:
            columns = (
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._bar.add_task(what, total=None)
            self._bar.start()
        task = self._bar.task_ids[0]
        self._bar.update(task, description=what, total=None if part is None else 1.0, completed=part or 0.0)

    def mesh(self, state: MeshState) -> None:
        self._end_bar()
        if self._settled:
            self._print_changes(state)
        else:
            if self._live is None:
                self._live = Live(console=self._console, refresh_per_second=8)
                self._live.start()
            self._live.update(_tree(state), refresh=True)
            if state.ready or state.failure:
                self._end_tree()
        self._shown = {child.name: _news(child) for child in state.children}

    def asked(self, prompt: str) -> None:
        self._end_tree()
        self._console.print(f"\n[bold]> {prompt}[/]")

    def piece(self, text: str) -> None:
        self._console.print(Text(printable(text)), end="", soft_wrap=True)

    def answered(self, answer: Answer) -> None:
        self._console.print(f"\n\n[dim]{summarise(answer)}[/]")

    def note(self, text: str) -> None:
        self._end_tree()
        self._console.print(Text(shown(text, keep="\n\t")), soft_wrap=True)

    def problem(self, text: str) -> None:
        self._end_tree()
        self._console.print(Text(shown(text, keep="\n\t"), style="red"), soft_wrap=True)

    def close(self) -> None:
        self._end_bar()
        self._end_tree()

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _end_tree(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None
            self._settled = True

    def _print_changes(self, state: MeshState) -> None:
        for child in state.children:
            if self._shown.get(child.name) != _news(child):
                self._console.print(Text(describe(child), style=COLOURS.get(child.state, "")))


class PlainView:
    """One line for each thing that happens; no colours, no cursor."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()
        self._children: dict[str, ChildState] = {}
        self._doing, self._told, self._doing_since = "", 0, 0.0

    def progress(self, what: str, part: float | None) -> None:
        if what != self._doing:
            self._doing, self._told, self._doing_since = what, 0, time.monotonic()
            self._line(what)
        quarters = int((part or 0.0) * 4)
        if self._told < quarters < 4:
            self._told = quarters
            self._line(f"  {quarters * 25} % after {time.monotonic() - self._doing_since:.0f} s")

    def mesh(self, state: MeshState) -> None:
        for child in state.children:
            known = self._children.get(child.name)
            if child.state == "starting" and not child.pid:
                continue  # its turn comes in a moment
            if known is None or _news(known) != _news(child):
                self._children[child.name] = child
                self._line(f"{time.monotonic() - self._began:6.1f} s  {describe(child)}")

    def asked(self, prompt: str) -> None:
        self._line(f"\n> {prompt}")

    def piece(self, text: str) -> None:
        self._out.write(printable(text))
        self._out.flush()

    def answered(self, answer: Answer) -> None:
        self._line(f"\n\n{summarise(answer)}")

    def note(self, text: str) -> None:
        self._line(text)

    def problem(self, text: str) -> None:
        print(shown(text, keep="\n\t"), file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        print(shown(text, keep="\n\t"), file=self._out, flush=True)


class JsonView:
    """One JSON object a line: ``{"event": "mesh" | "progress" | "asked" | "piece" | "answered" | ...}``."""

    def __init__(self, out: TextIO) -> None:
        self._out = out

    def progress(self, what: str, part: float | None) -> None:
        self._emit("progress", what=what, part=part)

    def mesh(self, state: MeshState) -> None:
        self._emit("mesh", **msgspec.structs.asdict(state))

    def asked(self, prompt: str) -> None:
        self._emit("asked", prompt=prompt)

    def piece(self, text: str) -> None:
        self._emit("piece", text=text)

    def answered(self, answer: Answer) -> None:
        self._emit(
            "answered",
            text=answer.text,
            num_tokens=answer.num_tokens,
            first_token_s=answer.first_token_s,
            total_s=answer.total_s,
        )

    def note(self, text: str) -> None:
        self._emit("note", text=text)

    def problem(self, text: str) -> None:
        self._emit("problem", text=text)

    def close(self) -> None:
        pass

    def _emit(self, event: str, **fields: Any) -> None:
        self._out.write(printable_json({"event": event, **fields}) + "\n")
        self._out.flush()


def _tree(state: MeshState) -> Tree:
    title = Text.assemble(("microserve", "bold"), f"  {shown(state.url)}  ", (shown(state.model), "dim"))
    tree = Tree(title)
    for child in state.children:
        symbol = SYMBOLS.get(child.state, "◌")
        tree.add(Text(f"{symbol} {describe(child)}", style=COLOURS.get(child.state, "")))
    return tree


def _news(child: ChildState) -> tuple[str, int, str]:
    """What is shown again when it changes; of the details that of one that is up: it is refused, say."""
    return child.state, child.restarts, child.detail if child.state == "ready" else ""


def describe(child: ChildState) -> str:
    """``engine e0    ready        pid 123   tcp://...``"""
    parts = [f"{child.name:<12}", f"{child.state:<10}"]
    if child.pid:
        parts.append(f"pid {child.pid:<8}")
    if child.address:
        parts.append(child.address)
    if child.about and child.state == "ready":
        parts.append(child.about)
    if child.restarts:
        parts.append(f"restarted {child.restarts}x")
    if child.detail and child.state in ("failed", "restarting", "stopped", "ready"):
        parts.append(child.detail)
    return shown(" ".join(parts).rstrip())


def printable(text: str) -> str:
    """A model's text without control characters: it must not command the terminal."""
    return "".join(
        each if each.isprintable() or each in "\n\t" else "\N{REPLACEMENT CHARACTER}" for each in text
    )


def summarise(answer: Answer) -> str:
    decode_s = max(answer.total_s - answer.first_token_s, 1e-9)
    rate = f", then {(answer.num_tokens - 1) / decode_s:.0f} tokens/s" if answer.num_tokens > 1 else ""
    tokens = "1 token" if answer.num_tokens == 1 else f"{answer.num_tokens} tokens"
    return f"{tokens}; the first after {answer.first_token_s * 1000:.0f} ms{rate}"
