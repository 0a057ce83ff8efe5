"""docs/authoring.md is as the code says, and what generates it can fail."""

from __future__ import annotations

import subprocess
import sys

import pytest

from microserve import testing
from microserve.services.router import authoring
from tests.test_packaging import ROOT


def test_the_page_is_as_the_code_says() -> None:
    command = [sys.executable, str(ROOT / "tooling/reference.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


@pytest.mark.parametrize("door", [authoring, testing], ids=["authoring", "testing"])
def test_every_name_of_the_doors_is_there(door: object) -> None:
    page = (ROOT / "docs/authoring.md").read_text(encoding="utf-8")
    for name in door.__all__:  # type: ignore[attr-defined]
        shown = (f"`{name}`", f"`{name}(", f"`{name}.", f"`await {name}(")
        is_said = any(f"#### {each}" in page for each in shown)
        assert is_said or name in ("Annotated", "Meta", "scorer"), name
