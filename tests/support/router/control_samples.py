"""One message of every kind of the control topic (WIRE.md 6.4), and its bytes."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, Codec
from microserve.protocol.messages import control

VERSION = control.StrategyVersion(
    version=3,
    source="s",
    digest="d",
    parameters={"ratio": 0.5},
    max_ttft_s=2.0,
    max_tpot_s=0.5,
    sticky_by="user",
)
ENTRY = control.ControlEntry(
    strategy="balanced", stable=VERSION, canary=VERSION, share=0.25, shadow=VERSION, shadow_share=0.5
)
FAULT = control.VersionFault(strategy="balanced", version=3, reason="r")
SCORE = control.ShadowScore(
    strategy="balanced",
    version=3,
    num_decisions=4,
    num_errors=1,
    num_agreed=2,
    ttft_s=0.5,
    served_ttft_s=1.0,
    computed_tokens=2.0,
    served_computed_tokens=4.0,
    sent_tokens=8.0,
    served_sent_tokens=16.0,
)
SERVED = control.StrategyServed(strategy="balanced", version=3, suspended=[2])
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
            max_ttft_s=2.0,
            max_tpot_s=0.5,
            engine="e",
            labels=["decode"],
            sticky_by="user",
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
            routers=[
                control.RouterControl(
                    router_id="router",
                    version=4,
                    faults=[FAULT],
                    shadows=[SCORE],
                    serves=[SERVED],
                    default_strategy="auto",
                )
            ],
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
                    shadow=True,
                )
            ],
        ),
    ),
]

GOLDEN: dict[str, str] = {
    "TO_INDEX.Change": (
        "dc00100707a163a77075626c697368a862616c616e636564a17381a5726174696fcb3fe0000000000000cb3fd00000000000"
        "0002c3a172cb4000000000000000cb3fe0000000000000a16591a66465636f6465a475736572"
    ),
    "TO_INDEX.ControlStatus": "920808",
    "TO_INDEX.ControlHistory": "940909a862616c616e63656405",
    "FROM_INDEX.Changed": "93070704",
    "FROM_INDEX.ControlState": (
        "9408049196a862616c616e6365649703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe00000"
        "00000000a4757365729703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0000000000000a4"
        "75736572cb3fd00000000000009703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0000000"
        "000000a475736572cb3fe00000000000009192a16591a66465636f6465"
    ),
    "FROM_INDEX.ControlReport": (
        "9509089408049196a862616c616e6365649703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3f"
        "e0000000000000a4757365729703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe000000000"
        "0000a475736572cb3fd00000000000009703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0"
        "000000000000a475736572cb3fe00000000000009192a16591a66465636f64659196a6726f75746572049193a862616c616e"
        "63656403a172919ba862616c616e63656403040102cb3fe0000000000000cb3ff0000000000000cb4000000000000000cb40"
        "10000000000000cb4020000000000000cb40300000000000009193a862616c616e636564039102a46175746fc3"
    ),
    "FROM_INDEX.ControlRecords": (
        "930a09919c03cb3ff8000000000000a56c6f63616ca77075626c697368a862616c616e636564a16481a5726174696fcb"
        "3fe0000000000000cb3fd0000000000000a172a16591a66465636f6465c3"
    ),
}
