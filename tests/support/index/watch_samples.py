"""Samples and golden bytes of what an index is told by who watches, and reports of it."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, Codec
from microserve.protocol.messages import index as membership
from tests.support.bus.wire_parts import CHECK, HOST
from tests.support.router import control_samples

MESSAGES: list[tuple[Codec[Any], Any]] = [
    (
        INDEX_REQUEST,
        membership.Watch(
            watcher_id="router",
            control_version=3,
            faults=[control_samples.FAULT],
            shadows=[control_samples.SCORE],
            serves=[control_samples.SERVED],
            default_strategy="auto",
            answers=True,
            next_s=2.5,
            trials=[control_samples.TRIAL],
            gateways=["http://a:80"],
            version="0.2",
            host=HOST,
            checks=[CHECK],
        ),
    ),
    (
        INDEX_REPLY,
        membership.IndexReport(
            call_id=6,
            num_engines=2,
            num_blocks=300,
            nbytes=30_000,
            counters={"joined": 2},
            missing=[membership.MissingEngine("e9", 1 << 59, "tcp://a:9", "c", "incarnation", "d", 2.5)],
            refused_keys={"k": 1.5},
            host=HOST,
            checks=[CHECK],
        ),
    ),
]
GOLDEN = {
    "TO_INDEX.Watch": (
        "9e04a6726f75746572039193a862616c616e63656403a172919ba862616c616e63656403040102cb3fe0000000000000cb3f"
        "f0000000000000cb4000000000000000cb4010000000000000cb4020000000000000cb40300000000000009193a862616c61"
        "6e636564039102a46175746fc3cb40040000000000009198a862616c616e6365640203cb3fd0000000000000c3cb3ff80000"
        "0000000095040192cb4000000000000000cb3fe000000000000091cb3ff000000000000091cb400800000000000095010090"
        "909091ab687474703a2f2f613a3830a3302e3296cb41d65a0bc00000000ccd0400ce00010000ce04000000ce02000000919b"
        "a26531a26532a764696666657273a6636163686564a462697473a16307cb3fe00000000000005acb4004000000000000a272"
        "31"
    ),
    "FROM_INDEX.IndexReport": (
        "9a050602cd012ccd753081a66a6f696e6564029197a26539cf0800000000000000a97463703a2f2f613a39a163ab696e6361"
        "726e6174696f6ea164cb400400000000000081a16bcb3ff800000000000096cb41d65a0bc00000000ccd0400ce00010000ce"
        "04000000ce02000000919ba26531a26532a764696666657273a6636163686564a462697473a16307cb3fe00000000000005a"
        "cb4004000000000000a27231"
    ),
}
