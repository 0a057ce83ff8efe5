"""Lines as they are typed: readline's editing, a history that is kept, texts of several lines.

The history is a file of JSON strings, one a line, for its owner alone; several chats add to it at once.
"""

from __future__ import annotations

import json
import os
import readline
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

MAX_HISTORY = 1000
PROMPT, MORE = "> ", ". "
QUOTES = '"""'


def history_file() -> Path:
    """``$XDG_STATE_HOME/microserve/chat_history``, else in ``~/.local/state``."""
    base = os.environ.get("XDG_STATE_HOME", "")
    if not os.path.isabs(base):  # the specification: then it is ignored
        base = os.path.expanduser("~/.local/state")
    return Path(base) / "microserve" / "chat_history"


def whole_text(read_line: Callable[[str], str], prompt: str = PROMPT) -> str:
    """One text of one or more lines, by the rules of ``\\`` and ``\"\"\"``. ``read_line`` is told the prompt;
    what it raises ends the text."""
    line = read_line(prompt)
    if line.startswith(QUOTES):
        lines = [line.removeprefix(QUOTES)]
        while QUOTES not in lines[-1]:
            lines.append(read_line(MORE))
        lines[-1] = lines[-1].partition(QUOTES)[0]
        return "\n".join(lines).strip("\n")
    lines = [line]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read_line(MORE))
    return "\n".join(lines)


class Editor:
    """A terminal's keyboard. Use as ``with``."""

    def __init__(self, history: Path | None, words: Sequence[str]) -> None:
        """``history``: None keeps none. ``words``: what Tab completes at the beginning of a line."""
        self._history = history
        self._words = words

    def __enter__(self) -> Editor:
        readline.set_auto_history(False)
        readline.parse_and_bind("set enable-bracketed-paste on")
        readline.parse_and_bind("tab: complete")
        readline.set_completer_delims("")
        readline.set_completer(self._complete)
        for text in self._read():
            readline.add_history(text)
        return self

    def __exit__(self, *_: object) -> None:
        readline.set_completer(None)
        readline.clear_history()
        readline.set_auto_history(True)

    def read(self, prompt: str = PROMPT) -> str:
        """Raises ``EOFError`` and ``KeyboardInterrupt``."""
        return whole_text(input, prompt)

    def keep(self, text: str) -> None:
        """In the history, here and for later chats."""
        readline.add_history(text)
        if self._history is None:
            return
        with suppress(OSError):  # a history is a convenience
            self._history.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
            with open(os.open(self._history, flags, 0o600), "a", encoding="utf-8") as file:
                file.write(json.dumps(text) + "\n")

    def _read(self) -> list[str]:
        if self._history is None:
            return []
        try:
            lines = self._history.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        found = []
        for line in lines[-MAX_HISTORY:]:
            with suppress(ValueError):
                if isinstance(text := json.loads(line), str):
                    found.append(text)
        if len(lines) > 2 * MAX_HISTORY:
            self._shorten(found)
        return found

    def _shorten(self, texts: Sequence[str]) -> None:
        assert self._history is not None
        with suppress(OSError):
            other = self._history.with_name(f"{self._history.name}.{os.getpid()}")
            with open(os.open(other, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                file.writelines(json.dumps(text) + "\n" for text in texts)
            other.replace(self._history)

    def _complete(self, text: str, number: int) -> str | None:
        fitting = [word for word in self._words if word.startswith(text)] if text.startswith("/") else []
        return fitting[number] if number < len(fitting) else None
