"""``microserve strategy check``: flags, what is printed, exit codes; the mistakes are test_mistakes.py's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from microserve.services.command.main import main
from microserve.services.command.strategy.check_process import check
from microserve.services.command.strategy.task import Finding, Task
from microserve.services.router.oversight.overseer import Overseer

HEAD = (
    "from microserve.services.router.authoring import strategy\n\n@strategy\nasync def mine(mesh, request):\n"
)


def invoke(*words: str) -> Result:
    return CliRunner().invoke(main, ["strategy", "check", *words])


def looked(body: str, labels: list[list[str]], *, is_strict: bool) -> Finding:
    """What is found by reading; a mistake at the end keeps it from being simulated here."""
    source = HEAD + body + "    yield mesh.pick(None, request).start_generate(request)\n    exit()\n"
    with Overseer(budget_s=0.1) as overseer:
        return check(Task("mine", source, {}, labels, is_strict=is_strict), overseer)


@pytest.mark.parametrize(
    ("label", "labels", "is_strict", "is_mistake", "is_noted"),
    [
        ("decode", [], False, False, False),
        ("decod", [], False, True, False),
        ("gold", [], False, False, True),
        ("gold", [["decode"], ["prefill"]], False, False, True),
        ("gold", [["decode"], ["prefill"]], True, True, False),
        ("gold", [["decode"], []], True, False, False),
        ("gold", [["gold", "big"]], True, False, False),
    ],
)
def test_a_label_that_nobody_has_is_a_mistake_where_that_is_certain(
    label: str, labels: list[list[str]], is_strict: bool, is_mistake: bool, is_noted: bool
) -> None:
    finding = looked(f"    mesh.pick({label!r}, request)\n", labels, is_strict=is_strict)
    assert [each.line for each in finding.mistakes if each.mistake == "nobodys-label"] == [5] * is_mistake
    assert any(label in note for note in finding.notes) == is_noted


def test_a_mistake_in_a_package_is_told_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/__init__.py").write_text(
        f"from .cost import least\n{HEAD}"
        "    yield mesh.pick(None, request, cost=least).start_generate(request)\n"
    )
    (tmp_path / "mine/cost.py").write_text("def least(engine):\n    return engine.info['no such']\n")
    done = invoke(str(tmp_path / "mine"), "--labels", "a,b+c")
    assert (done.exit_code, done.stdout) == (1, "")
    assert f"Error: {tmp_path}/mine/cost.py:2: TypeError" in done.stderr


@pytest.mark.slow
def test_a_sound_strategy_ends_with_0_and_torch_is_not_needed(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    body = "    yield mesh.pick(None, request).start_generate(request)\n"
    file.write_text(f"import sys\n{HEAD}    assert 'torch' not in sys.modules\n{body}")
    done = invoke(str(file), "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["sound"], told["mistakes"]) == (0, True, [])
    assert "a request takes" in told["notes"][-1]


def test_wrong_flags_exit_2(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(HEAD)
    for words in (
        [str(tmp_path / "absent.py")],
        [str(tmp_path)],
        [str(file), "--labels", "a", "--live"],
        [str(file), "--set", "ratio"],
    ):
        assert invoke(*words).exit_code == 2, words
