"""The terminal's view of a mesh: a tree of states that redraws in place, and a progress bar (rich)."""

from __future__ import annotations

from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text
from rich.tree import Tree

from microserve.services.local.demo_request import Answer
from microserve.services.local.directory import MeshState
from microserve.services.local.view import COLOURS, SYMBOLS, describe, printable, summarise


class RichView:
    """Redraws the tree until all are ready; later changes are printed below, line by line."""

    def __init__(self, out: TextIO) -> None:
        self._console = Console(file=out, highlight=False)
        self._bar: Progress | None = None
        self._live: Live | None = None
        self._settled = False
        self._shown: dict[str, tuple[str, int]] = {}

    def progress(self, what: str, part: float | None) -> None:
        if self._bar is None:
            columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
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
        self._shown = {child.name: (child.state, child.restarts) for child in state.children}

    def asked(self, prompt: str) -> None:
        self._end_tree()
        self._console.print(f"\n[bold]> {prompt}[/]")

    def piece(self, text: str) -> None:
        self._console.print(Text(printable(text)), end="", soft_wrap=True)

    def answered(self, answer: Answer) -> None:
        self._console.print(f"\n\n[dim]{summarise(answer)}[/]")

    def note(self, text: str) -> None:
        self._end_tree()
        self._console.print(Text(text), soft_wrap=True)

    def problem(self, text: str) -> None:
        self._end_tree()
        self._console.print(Text(text, style="red"), soft_wrap=True)

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
            if self._shown.get(child.name) != (child.state, child.restarts):
                self._console.print(Text(describe(child), style=COLOURS.get(child.state, "")))


def _tree(state: MeshState) -> Tree:
    title = f"[bold]microserve[/]  {state.url}"
    tree = Tree(f"{title}  [dim]{state.model}[/]" if state.model else title)
    for child in state.children:
        symbol = SYMBOLS.get(child.state, "◌")
        tree.add(Text(f"{symbol} {describe(child)}", style=COLOURS.get(child.state, "")))
    return tree
