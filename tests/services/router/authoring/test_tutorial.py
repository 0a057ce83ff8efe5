"""docs/strategies.md: every Python block is a file that serves, and the lists name what there is."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest

from microserve.services.router.authoring.definition import Strategy, load_file
from microserve.services.router.strategies import BUILT_IN
from microserve.services.router.strategies.splitting.balanced import balanced
from microserve.services.router.strategies.splitting.balanced_adaptive import balanced_adaptive
from tests.support.router.router_world import expected_output, in_loop, router_world

ROOT = Path(__file__).parents[4]
PAGE = (ROOT / "docs" / "strategies.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.DOTALL | re.MULTILINE)


def test_it_goes_from_four_lines_to_the_strategy_that_is_shipped() -> None:
    assert len(SNIPPETS) == 15
    code = [line for line in SNIPPETS[0].splitlines() if line and "import" not in line]
    assert len(code) == 4
    _, _, whole = PAGE.partition("\n## The whole of it")
    shown = re.search(r"^```python\n(.*?)^```$", whole, re.DOTALL | re.MULTILINE)
    source = Path(str(inspect.getsourcefile(balanced_adaptive.function))).read_text("utf-8")
    assert shown is not None
    assert shown[1] == source


def test_the_readme_shows_balanced_as_it_is() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^```python\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    source = Path(str(inspect.getsourcefile(balanced.function))).read_text(encoding="utf-8")
    _, future, code = source.partition("from __future__ import annotations\n\n")
    assert future
    assert code in shown


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
@pytest.mark.parametrize("engines", [["only"], ["d", "p"]])
def test_every_snippet_serves(number: int, engines: list[str], tmp_path: Path) -> None:
    file = tmp_path / f"snippet_{number}.py"
    file.write_text(SNIPPETS[number], encoding="utf-8")
    [item] = load_file(str(file))
    labels = {"d": ["decode"], "p": ["prefill"], "only": []}

    @in_loop
    async def main() -> None:
        async with router_world(*engines, labels=labels) as world:
            mine = Strategy("mine", item.function, item.types, item.values, item.description, item.plan)
            world.router.strategies.add(mine)
            for num_tokens in (1, 200, 200):
                answer = await world.gateway.generate(list(range(num_tokens)), strategy="mine")
                assert answer.token_ids == expected_output(4), answer.result

    main()


def _rows(text: str) -> dict[str, str]:
    """Rows of tables by the name that they begin with."""
    return {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)`.*$", text, re.MULTILINE)}


def test_every_strategy_is_listed_with_its_parameters() -> None:
    rows = _rows(PAGE)
    assert set(rows) == {item.name for item in BUILT_IN}
    for item in BUILT_IN:
        named = re.findall(r"`(\w+)`", rows[item.name].rsplit("|", 2)[1])
        assert named == list(item.types), item.name


def test_the_readme_lists_every_strategy() -> None:
    rows = _rows((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {item.name for item in BUILT_IN} <= set(rows)
