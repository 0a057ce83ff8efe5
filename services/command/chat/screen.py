"""How an answer looks: thoughts dim, calls as JSON, one line of figures behind it; plain where nobody
looks."""

from __future__ import annotations

import json

from microserve.services.command.chat.answer import STOPPED, TEXT, THOUGHT, Answer, Call, Piece
from microserve.services.command.chat.blocks import Blocks
from microserve.services.command.shared.terminal import echo, markdown, write


class Screen:
    """One for a chat; ``show`` pieces, then ``finish`` the answer."""

    def __init__(self, *, is_terminal: bool, draws: bool = False) -> None:
        """``is_terminal``: else there is the answer's text and nothing else. ``draws``: Markdown."""
        self._is_terminal = is_terminal
        self.draws = draws and is_terminal
        self._blocks = Blocks()
        self._kind = ""
        self._at_line_start = True

    def show(self, piece: Piece) -> None:
        if piece.kind == THOUGHT and not self._is_terminal:
            return
        if self._kind == THOUGHT and piece.kind == TEXT:
            self._end_line()
        self._kind = piece.kind
        if piece.kind == TEXT and self.draws:
            for block in self._blocks.push(piece.text):
                markdown(block)
            return
        write(piece.text, style="dim" if piece.kind == THOUGHT else "")
        self._at_line_start = piece.text.endswith("\n")

    def finish(self, answer: Answer) -> None:
        """The rest, its calls, what is wrong with it, and the figures."""
        if rest := self._blocks.rest():
            markdown(rest)
        self._end_line()
        self._kind = ""
        for call in answer.calls.values():
            write(f"{call.name}({arguments_of(call)})\n", style="call")
        if answer.fault:
            self.problem(fault_of(answer))
        elif self._is_terminal and answer.finish_reason == "length":
            self.note("(cut at max_tokens)")
        if self._is_terminal and not answer.was_refused and answer.first_s:
            self.note(figures_of(answer))
        if self._is_terminal and (warning := answer.served_by.get("warning")):
            self.note(f"warning: {warning}")

    def note(self, text: str) -> None:
        write(f"{text}\n", style="dim")

    def problem(self, text: str) -> None:
        echo(f"Error: {text}" if not text.startswith("(") else text, err=True)

    def _end_line(self) -> None:
        if not self._at_line_start:
            write("\n")
        self._at_line_start = True


def arguments_of(call: Call) -> str:
    """As JSON in lines, or as they came."""
    try:
        value = json.loads(call.arguments or "{}")
        return json.dumps(value, indent=2, ensure_ascii=False) if value else ""
    except (ValueError, RecursionError):
        return call.arguments


def fault_of(answer: Answer) -> str:
    """Why an answer is not whole, and how much of it there is."""
    if answer.fault == STOPPED:
        return "(stopped)"
    if answer.was_refused or not (answer.text or answer.thought):
        return answer.fault
    return f"the answer is cut off after {len(answer.text)} characters: {answer.fault}"


def figures_of(answer: Answer) -> str:
    """``TTFT 0.23 s, 64 tokens at 89.1/s, prompt 41; auto on e0,e1``."""
    parts = [f"TTFT {answer.first_s:.2f} s"]
    rest_s = answer.total_s - answer.first_s
    if answer.num_answer_tokens:
        speed = f" at {(answer.num_answer_tokens - 1) / rest_s:.1f}/s" if rest_s > 0 else ""
        parts.append(f"{answer.num_answer_tokens} tokens{speed if answer.num_answer_tokens > 1 else ''}")
        parts.append(f"prompt {answer.num_prompt_tokens}")
    served = answer.served_by
    if strategy := served.get("strategy"):
        engines = f" on {served['engines']}" if served.get("engines") else ""
        version = served.get("strategy-version", "0")
        parts[-1] += f"; {strategy}{f' {version}' if version != '0' else ''}{engines}"
    return ", ".join(parts)
