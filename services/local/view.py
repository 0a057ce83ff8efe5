"""How ``microserve up`` and ``ps`` show a mesh: a living tree, plain lines off a terminal, or JSON lines.

Owns the screen; is told what happens and decides nothing.
"""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol, TextIO

import msgspec

from microserve.services.local.demo_request import Answer
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
        return JsonView(out)
    if out.isatty():
        from microserve.services.rich_view import RichView

        return RichView(out)
    return PlainView(out)


class PlainView:
    """One line for each thing that happens; no colours, no cursor."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._began = time.monotonic()
        self._children: dict[str, ChildState] = {}
        self._doing = ""

    def progress(self, what: str, part: float | None) -> None:
        if what != self._doing:
            self._doing = what
            self._line(what)

    def mesh(self, state: MeshState) -> None:
        for child in state.children:
            known = self._children.get(child.name)
            if child.state == "starting" and not child.pid:
                continue  # its turn comes in a moment
            if known is None or (known.state, known.restarts) != (child.state, child.restarts):
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
        print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        pass

    def _line(self, text: str) -> None:
        print(text, file=self._out, flush=True)


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
        self._out.write(msgspec.json.encode({"event": event, **fields}).decode() + "\n")
        self._out.flush()


def describe(child: ChildState) -> str:
    """``engine e0    ready        pid 123   tcp://...``"""
    parts = [f"{child.name:<12}", f"{child.state:<10}"]
    if child.pid:
        parts.append(f"pid {child.pid:<8}")
    if child.address:
        parts.append(child.address)
    if child.restarts:
        parts.append(f"restarted {child.restarts}x")
    if child.detail and child.state in ("failed", "restarting", "stopped"):
        parts.append(child.detail)
    return " ".join(parts).rstrip()


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
