"""Messages with names: an author's source is left out, whence KV was sent is not."""

from __future__ import annotations

from microserve.gateway.view.naming import named
from microserve.protocol.messages.strategy.control import ControlEntry, StrategyVersion
from microserve.protocol.messages.strategy.decisions import SendSeen


def test_an_author_s_source_is_left_out() -> None:
    entry = ControlEntry("mine", StrategyVersion(3, "SECRET = 1", "ab", {"x": 1}))
    told = named(entry)
    assert "source" not in told["stable"]
    assert (told["stable"]["digest"], told["stable"]["parameters"]) == ("ab", {"x": 1})


def test_whence_kv_was_sent_is_told() -> None:
    assert named([SendSeen("e0", "e1", 0, 16)]) == [
        {"source": "e0", "target": "e1", "begin": 0, "end": 16, "coding": None}
    ]
