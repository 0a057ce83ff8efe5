"""What is typed: orders, texts of several lines, a history that is kept; and Markdown cut where it may be."""

from __future__ import annotations

import json
import readline
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.services.command.chat import editor as editing
from microserve.services.command.chat.blocks import Blocks
from microserve.services.command.chat.editor import Editor, whole_text
from microserve.services.command.chat.order import ORDERS, Order, Unknown, help_lines, parse


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("hello /there", "hello /there"),
        ("/quit", Order("quit")),
        ("/system  be brief ", Order("system", "be brief")),
        ("/SYSTEM -", Order("system", "-")),
        ("/temp 0", Order("temperature", "0")),
        ("/m", Unknown("m")),
        ("/modle", Unknown("modle", "model")),
        ("/", Unknown("")),
        ("//etc", "/etc"),
        ("/save a b", Order("save", "a b")),
    ],
)
def test_orders(text: str, parsed: object) -> None:
    result = parse(text)
    assert result == parsed if not isinstance(parsed, Unknown) or parsed.meant else result.name == parsed.name  # type: ignore[union-attr]


def test_help_has_every_order_and_fits_a_terminal() -> None:
    lines = help_lines()
    assert all(any(line.startswith(f"/{name}") for line in lines) for name in ORDERS)
    assert max(map(len, lines)) <= 110


def typed(*lines: str) -> str:
    rest: Iterator[str] = iter(lines)
    return whole_text(lambda prompt: next(rest))


def test_texts_of_several_lines() -> None:
    assert typed("one") == "one"
    assert typed("one\\", "two\\", "three", "not this") == "one\ntwo\nthree"
    assert typed('"""', "a\\", "", 'b"""', "not this") == "a\\\n\nb"
    assert typed('"""a', '"""') == "a"
    assert typed('"""a"""') == "a"


@pytest.mark.slow
def test_a_history_is_kept_and_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(editing, "MAX_HISTORY", 3)
    file = tmp_path / "deep/history"
    texts = ["one", "two\nlines", "three", "four", "five", "six", "seven"]
    for text in texts:
        with Editor(file, []) as editor:
            editor.keep(text)
    assert file.stat().st_mode & 0o777 == 0o600
    file.write_text(file.read_text() + "no JSON\n3\n")
    with Editor(file, []):
        shown = [readline.get_history_item(at + 1) for at in range(readline.get_current_history_length())]
    assert shown == ["seven"], "the last three lines, of which one is a text"
    assert len(file.read_text().splitlines()) <= 6
    with Editor(None, []) as editor:
        assert readline.get_current_history_length() == 0
        editor.keep("not kept")
    assert "not kept" not in file.read_text()


def test_a_history_that_cannot_be_kept_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with Editor(tmp_path / "file" / "history", []) as editor:
        editor.keep("text")


def test_a_history_is_json(tmp_path: Path) -> None:
    with Editor(tmp_path / "h", []) as editor:
        editor.keep("a\n\u2028b")
    assert json.loads((tmp_path / "h").read_text()) == "a\n\u2028b"


# --- blocks ------------------------------------------------------------------------------------------

lines = st.sampled_from(["text", "", "```", "```py", "~~~", "    code", "- item", "````", "  ", "`x`"])


@given(st.lists(lines, max_size=15).map("\n".join), st.data())
def test_blocks_joined_are_the_text_however_it_comes(text: str, data: st.DataObject) -> None:
    whole = Blocks()
    expected = [*whole.push(text), whole.rest()]
    assert "".join(expected) == text
    blocks, found, rest = Blocks(), list[str](), text
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        found += blocks.push(rest[:size])
        rest = rest[size:]
    assert [*found, blocks.rest()] == expected


def test_a_fence_is_never_cut() -> None:
    blocks = Blocks()
    assert blocks.push("a\n\n```py\nx\n\ny\n") == ["a\n\n"]
    assert blocks.push("```\n\nb") == ["```py\nx\n\ny\n```\n\n"]
    assert blocks.rest() == "b"
    assert blocks.push("~~~\n```\n\n~~~\n\n") == ["~~~\n```\n\n~~~\n\n"]
