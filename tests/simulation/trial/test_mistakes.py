"""Every mistake of docs/authoring.md is told by ``strategy check`` in one sentence, with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from microserve.services.command.main import main
from microserve.services.command.strategy.check import look
from tests.support.router.mistaken_strategies import SAMPLES
from tests.test_packaging import ROOT

pytestmark = pytest.mark.heavy
PAGE = (ROOT / "docs/strategies.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("name", SAMPLES)
def test_a_mistake_is_told_with_its_line_and_what_mends_it(name: str, tmp_path: Path) -> None:
    sample, file = SAMPLES[name], tmp_path / "mine.py"
    file.write_text(sample.source)
    done = CliRunner().invoke(main, ["strategy", "check", str(file), "--json"])
    told = json.loads(done.stdout)
    assert done.exit_code == 1, told
    assert [each["mistake"] for each in told["mistakes"]] == [sample.mistake], told
    [found] = told["mistakes"]
    assert sample.says in found["text"], told
    assert found["line"] == sample.line or not sample.line, told
    assert found["line"] > 0, told


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_no_mistake_is_found_in_what_the_tutorial_shows(number: int) -> None:
    source = SNIPPETS[number]
    [name] = re.findall(r"^@strategy.*\nasync def (\w+)", source, re.MULTILINE)
    assert look(name, source, {}, []).mistakes == []
