"""``make help`` has a sentence for every target."""

from __future__ import annotations

import importlib.util
import re

from tests.test_packaging import ROOT

spec = importlib.util.spec_from_file_location("targets", ROOT / "tooling/targets.py")
assert spec is not None and spec.loader is not None
targets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(targets)


def test_every_target_that_can_be_asked_for_has_its_sentence() -> None:
    makefile = (ROOT / "Makefile").read_text()
    found = dict(targets.targets(makefile))
    phony = {name for line in re.findall(r"^\.PHONY: (.*)$", makefile, re.M) for name in line.split()}
    assert phony - targets.INNER == set(found)
    assert [name for name, sentence in found.items() if not sentence] == []


def test_a_sentence_ends_where_it_ends() -> None:
    text = "# One, two. Three.\nWORD = x\none: two\n\tdo it\n\n# Of 1.5 GB: four\nfour:\n"
    assert targets.targets(text) == [("one", "One, two"), ("four", "Of 1.5 GB")]
