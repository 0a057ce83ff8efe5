"""One message of every kind of the control topic (WIRE.md 6.4), and its bytes."""

from __future__ import annotations

from typing import Any

from microserve.protocol import control
from microserve.protocol.codec import INDEX_REPLY, INDEX_REQUEST, Codec

VERSION = control.StrategyVersion(version=3, source="s", digest="d", parameters={"ratio": 0.5})
ENTRY = control.ControlEntry(strategy="balanced", stable=VERSION, canary=VERSION, share=0.25)
FAULT = control.VersionFault(strategy="balanced", version=3, reason="r")
LABELS = control.EngineLabels(engine="e", labels=["decode"])
CONTROL = control.ControlState(version=4, entries=[ENTRY], labels=[LABELS])

MESSAGES: list[tuple[Codec[Any], Any]] = [
    (
        INDEX_REQUEST,
        control.Change(
            call_id=7,
            change_id="c",
            kind="publish",
            strategy="balanced",
            source="s",
            parameters={"ratio": 0.5},
            share=0.25,
            version=2,
            shadow=True,
            reason="r",
            engine="e",
            labels=["decode"],
        ),
    ),
    (INDEX_REQUEST, control.ControlStatus(call_id=8)),
    (INDEX_REQUEST, control.ControlHistory(call_id=9, strategy="balanced", limit=5)),
    (INDEX_REPLY, control.Changed(call_id=7, version=4)),
    (INDEX_REPLY, CONTROL),
    (
        INDEX_REPLY,
        control.ControlReport(
            call_id=8,
            state=CONTROL,
            routers=[control.RouterControl(router_id="router", version=4, faults=[FAULT])],
            durable=True,
        ),
    ),
    (
        INDEX_REPLY,
        control.ControlRecords(
            call_id=9,
            records=[
                control.ControlRecord(
                    version=3,
                    at=1.5,
                    who="local",
                    kind="publish",
                    strategy="balanced",
                    digest="d",
                    parameters={"ratio": 0.5},
                    share=0.25,
                    reason="r",
                    engine="e",
                    labels=["decode"],
                )
            ],
        ),
    ),
]

GOLDEN: dict[str, str] = {
    "TO_INDEX.Change": (
        "9d0707a163a77075626c697368a862616c616e636564a17381a5726174696fcb3fe0000000000000cb3fd00000000000"
        "0002c3a172a16591a66465636f6465"
    ),
    "TO_INDEX.ControlStatus": "920808",
    "TO_INDEX.ControlHistory": "940909a862616c616e63656405",
    "FROM_INDEX.Changed": "93070704",
    "FROM_INDEX.ControlState": (
        "9408049194a862616c616e6365649403a173a16481a5726174696fcb3fe00000000000009403a173a16481a572617469"
        "6fcb3fe0000000000000cb3fd00000000000009192a16591a66465636f6465"
    ),
    "FROM_INDEX.ControlReport": (
        "9509089408049194a862616c616e6365649403a173a16481a5726174696fcb3fe00000000000009403a173a16481a572"
        "6174696fcb3fe0000000000000cb3fd00000000000009192a16591a66465636f64659193a6726f75746572049193a862"
        "616c616e63656403a172c3"
    ),
    "FROM_INDEX.ControlRecords": (
        "930a09919b03cb3ff8000000000000a56c6f63616ca77075626c697368a862616c616e636564a16481a5726174696fcb"
        "3fe0000000000000cb3fd0000000000000a172a16591a66465636f6465"
    ),
}
