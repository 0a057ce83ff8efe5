"""Event names are an interface: one form, each once."""

from __future__ import annotations

import re

from microserve.protocol import log

NAMES = {name: value for name, value in vars(log).items() if name.isupper() and isinstance(value, str)}


def test_names_are_noun_and_past_and_match_their_constants() -> None:
    assert len(NAMES) > 30
    for name, value in NAMES.items():
        assert re.fullmatch(r"[a-z]+\.[a-z_]+", value), value
        assert name == value.upper().replace(".", "_")
    assert len(set(NAMES.values())) == len(NAMES)
