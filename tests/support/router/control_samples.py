"""One message of every kind of the control topic (WIRE.md 6.4), and its bytes."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, Codec
from microserve.protocol.messages.host import HostFacts
from microserve.protocol.messages.strategy import control, scores

VERSION = control.StrategyVersion(
    version=3,
    source="s",
    digest="d",
    parameters={"ratio": 0.5},
    max_ttft_s=2.0,
    max_tpot_s=0.5,
    sticky_by="user",
)
RAMP = scores.Ramp(shares=[0.25, 1.0], every_s=60.0, min_requests=20, until="better", paused=True)
ENTRY = control.ControlEntry(
    strategy="balanced",
    stable=VERSION,
    canary=VERSION,
    share=0.25,
    shadow=VERSION,
    shadow_share=0.5,
    ramp=RAMP,
)
SIDE = scores.Side(num_requests=4, num_failed=1, ttft=[2.0, 0.5], tpot=[1.0], jct=[3.0])
TRIAL = scores.Trial(
    strategy="balanced",
    stable_version=2,
    canary_version=3,
    share=0.25,
    is_sticky=True,
    seconds=1.5,
    stable=SIDE,
    canary=scores.Side(num_requests=1),
)
TIMES = scores.Times(num=3, log_sum=-1.5, log_square_sum=2.5, buckets={7: 3})
FARES = scores.Score(
    strategy="balanced",
    version=3,
    share="canary",
    engine_id="e1",
    num_requests=5,
    failures={"cache_full": 1},
    num_mistakes=2,
    num_moves=3,
    prompt_tokens=40,
    cached_tokens=16,
    received_tokens=8,
    output_tokens=9,
    ttft=TIMES,
    tpot=scores.Times(),
    jct=TIMES,
    seconds=2.5,
    side=SIDE,
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
            ramp=RAMP,
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
                    trials=[TRIAL],
                    gateways=["http://a:80"],
                    software="0.2",
                    host=HostFacts(1.5e9, 12, 1024, 65_536, 1 << 26, 1 << 25),
                    clock_off_s=-1.5,
                )
            ],
            durable=True,
            ramps=[
                scores.RampState(
                    strategy="balanced", next_share=0.5, seconds=12.5, num_requests=7, waits_for="w"
                )
            ],
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
                    ramp=RAMP,
                )
            ],
        ),
    ),
]

GOLDEN: dict[str, str] = {
    "TO_INDEX.Change": (
        "dc00110707a163a77075626c697368a862616c616e636564a17381a5726174696fcb3fe0000000000000cb3fd00000000000"
        "0002c3a172cb4000000000000000cb3fe0000000000000a16591a66465636f6465a4757365729592cb3fd0000000000000cb"
        "3ff0000000000000cb404e00000000000014a6626574746572c3"
    ),
    "TO_INDEX.ControlStatus": "920808",
    "TO_INDEX.ControlHistory": "940909a862616c616e63656405",
    "FROM_INDEX.Changed": "93070704",
    "FROM_INDEX.ControlState": (
        "9408049197a862616c616e6365649703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe00000"
        "00000000a4757365729703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0000000000000a4"
        "75736572cb3fd00000000000009703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0000000"
        "000000a475736572cb3fe00000000000009592cb3fd0000000000000cb3ff0000000000000cb404e00000000000014a66265"
        "74746572c39192a16591a66465636f6465"
    ),
    "FROM_INDEX.ControlReport": (
        "9609089408049197a862616c616e6365649703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3f"
        "e0000000000000a4757365729703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe000000000"
        "0000a475736572cb3fd00000000000009703a173a16481a5726174696fcb3fe0000000000000cb4000000000000000cb3fe0"
        "000000000000a475736572cb3fe00000000000009592cb3fd0000000000000cb3ff0000000000000cb404e00000000000014"
        "a6626574746572c39192a16591a66465636f6465919ba6726f75746572049193a862616c616e63656403a172919ba862616c"
        "616e63656403040102cb3fe0000000000000cb3ff0000000000000cb4000000000000000cb4010000000000000cb40200000"
        "00000000cb40300000000000009193a862616c616e636564039102a46175746f9198a862616c616e6365640203cb3fd00000"
        "00000000c3cb3ff800000000000095040192cb4000000000000000cb3fe000000000000091cb3ff000000000000091cb4008"
        "00000000000095010090909091ab687474703a2f2f613a3830a3302e3296cb41d65a0bc00000000ccd0400ce00010000ce04"
        "000000ce02000000cbbff8000000000000c39195a862616c616e636564cb3fe0000000000000cb402900000000000007a177"
    ),
    "FROM_INDEX.ControlRecords": (
        "930a09919d03cb3ff8000000000000a56c6f63616ca77075626c697368a862616c616e636564a16481a5726174696fcb3fe0"
        "000000000000cb3fd0000000000000a172a16591a66465636f6465c39592cb3fd0000000000000cb3ff0000000000000cb40"
        "4e00000000000014a6626574746572c3"
    ),
}
