"""Published chat templates, rendered here and by transformers: ``make conformance TEMPLATES=DIR``.

A directory of files ``*.jinja``, as models and collections have them. For each, and each conversation below:
the same text, or both refuse; anything else is a difference, and the tool fails.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from microserve.gateway.text.prompt.chat_template import ChatTemplate

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "é日本"}, "days": {"type": "integer"}},
    "required": ["city"],
}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "weather", "description": 'Now <& "then"', "parameters": PARAMETERS},
    }
]
CALL = {
    "id": "call12345",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Zürich <x>", "days": 2}},
}
USER = {"role": "user", "content": " Hi <b> & 'q' \n"}
SYSTEM = {"role": "system", "content": "Be brief."}
SAID = {"role": "assistant", "content": "Hello"}
THOUGHT = {**SAID, "reasoning_content": "hm"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
SILENT = {**CALLED, "content": None}
TWICE = {**CALLED, "tool_calls": [CALL, CALL]}
RESULT = {"role": "tool", "tool_call_id": "call12345", "name": "weather", "content": '{"t": 20}'}
Conversation = tuple[list[dict[str, Any]], bool, dict[str, Any]]
CONVERSATIONS: Mapping[str, Conversation] = {
    "a question": ([USER], False, {}),
    "a system's": ([SYSTEM, USER], False, {}),
    "turns": ([USER, SAID, USER], False, {}),
    "a system's turns": ([SYSTEM, USER, SAID, USER], False, {}),
    "tools": ([USER], True, {}),
    "a system's tools": ([SYSTEM, USER], True, {}),
    "a result": ([USER, CALLED, RESULT], True, {}),
    "a result, no text": ([SYSTEM, USER, SILENT, RESULT], True, {}),
    "a result, and on": ([SYSTEM, USER, CALLED, RESULT, SAID, USER], True, {}),
    "two results": ([USER, TWICE, RESULT, RESULT], True, {}),
    "a result without tools": ([USER, CALLED, RESULT], False, {}),
    "a thought": ([USER, THOUGHT, USER], False, {}),
    "no thinking": ([USER], False, {"enable_thinking": False}),
    "an effort": ([USER], True, {"reasoning_effort": "high"}),
    "no header": ([USER, SAID], False, {"add_generation_prompt": False}),
}
"""Messages, whether there are tools, and variables of the template."""


def ours(source: str, messages: list[dict[str, Any]], with_tools: bool, options: dict[str, Any]) -> str:
    return ChatTemplate(source, SPECIAL).render(messages, TOOLS if with_tools else None, options)


def theirs(source: str, messages: list[dict[str, Any]], with_tools: bool, options: dict[str, Any]) -> str:
    [text], _ = render_jinja_template(
        conversations=[messages],
        tools=TOOLS if with_tools else None,
        chat_template=source,
        **{"add_generation_prompt": True, **SPECIAL, **options},
    )
    return str(text)


def outcome(render: Callable[..., str], source: str, conversation: Conversation) -> str | None:
    """The text; None where it is refused, in whatever way."""
    try:
        return render(source, *deepcopy(conversation))
    except Exception:  # a template raises what it likes
        return None


def compared(source: str) -> dict[str, str]:
    """By conversation: ``equal``, ``both refuse`` or ``differ``."""
    found = {}
    for name, conversation in CONVERSATIONS.items():
        first, second = (outcome(render, source, conversation) for render in (ours, theirs))
        found[name] = "differ" if first != second else "both refuse" if first is None else "equal"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    paths = sorted(parser.parse_args().directory.rglob("*.jinja"))
    counts: Counter[str] = Counter()
    for path in paths:
        found = compared(path.read_text(encoding="utf-8"))
        counts += Counter(found.values())
        for name in (name for name, each in found.items() if each == "differ"):
            print(f"{path.name}: {name}")
    told = ", ".join(f"{name} {counts[name]}" for name in ("equal", "both refuse", "differ"))
    print(f"{len(paths)} templates, {len(CONVERSATIONS)} conversations each: {told}")
    if counts["differ"] or not paths:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
