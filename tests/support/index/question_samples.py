"""Samples and frozen bytes of the messages about decisions (WIRE.md 6.6); part of wire_samples.py."""

from __future__ import annotations

from typing import Any

from microserve.protocol.bus.codec import INDEX_REPLY, INDEX_REQUEST, Codec
from microserve.protocol.messages.numerics import Numerics
from microserve.protocol.messages.strategy import decisions
from tests.support.bus.wire_parts import CODING, GEOMETRY, LOAD
from tests.support.router.control_samples import FARES

ENGINE = decisions.EngineSeen(
    engine_id="e1",
    labels=["decode"],
    numerics=Numerics("n1", is_exact=True),
    num_blocks=2048,
    own_tokens=5,
    own_sequences=2,
    own_transfer_tokens=3,
    load=LOAD,
    load_age_s=0.25,
    can=["prep_recv"],
    geometry=GEOMETRY,
    split_tokens=8,
    recompute_tokens=2,
    backend="native",
    cluster="c1",
)
PICK = decisions.Pick(
    at_s=0.5,
    label="decode",
    by="cost",
    temperature=0.75,
    candidates=["e1", "e2"],
    costs=[1.5, 2.5],
    uncached_tokens=[6, 7],
    sequences=[8, 9],
    chosen="e1",
    excluded=["e3"],
    numerics="n1",
    scored=[decisions.Scored(name="load", scores=[3.5, 4.5], weight=5.5)],
)
ATTEMPT = decisions.Attempt(
    strategy="balanced",
    version=3,
    at_s=0.125,
    num_tokens=40,
    cached={"e1": 16},
    engines=[ENGINE],
    picks=[PICK],
    num_picks=33,
    notes=[decisions.Note(at_s=1.5, text="t", values={"v": 2.5})],
    num_notes=17,
    sends=[decisions.SendSeen(source="e2", target="e1", begin=16, end=30, coding=CODING)],
    engine_id="e1",
    begin=30,
    awaits_first=True,
)
EXPLANATION = decisions.Explanation(
    request_id="r1.0a0a0a0a-0",
    age_s=6.5,
    strategy="balanced",
    version=3,
    tenant=True,
    attributes=["user"],
    block_size=16,
    num_prompt_tokens=40,
    num_output_tokens=5,
    max_tokens=17,
    reason="error",
    code="cache_full",
    attempts=[ATTEMPT],
    num_attempts=9,
    is_cut=True,
)

MESSAGES: list[tuple[Codec[Any], Any]] = [
    (INDEX_REQUEST, decisions.Explain(call_id=1, request_id="r1", scores_of="balanced")),
    (
        INDEX_REQUEST,
        decisions.Answer(
            question_id=2,
            router_id="router",
            found=[EXPLANATION],
            num_left_out=3,
            num_kept=400,
            scores=[FARES],
        ),
    ),
    (INDEX_REPLY, decisions.Question(question_id=2, request_id="r1", scores_of="balanced")),
    (INDEX_REPLY, decisions.Asked(call_id=1, routers=["router"], silent=["other"])),
    (
        INDEX_REPLY,
        decisions.Explained(
            call_id=1,
            router_id="router",
            found=[EXPLANATION],
            num_left_out=3,
            num_kept=400,
            scores=[FARES],
        ),
    ),
]

GOLDEN: dict[str, str] = {
    "TO_INDEX.Explain": "940b01a27231a862616c616e636564",
    "TO_INDEX.Answer": (
        "970c02a6726f75746572919fad72312e30613061306130612d30cb401a000000000000a862616c616e63656403c391a47573"
        "657210280511a56572726f72aa63616368655f66756c6c919ea862616c616e63656403cb3fc00000000000002881a2653110"
        "919fa2653191a66465636f646592a26e31c3cd0800050203dc0017cf00000004000000000203040506070809cb4025000000"
        "000000cb3fc0000000000000c340cb3fe8000000000000cb4034800000000000cb3fd8000000000000cd02000bcb3ff40000"
        "00000000cb3fd0000000000000cb3fc0000000000000cb3fd00000000000009192a26532cb413312d000000000cb3fd00000"
        "0000000091a9707265705f7265637699a862666c6f61743136a26f31101e0340a3667038b364656661756c74207468657461"
        "3d3130303030a264310802a66e6174697665a26331919ccb3fe0000000000000a66465636f6465a4636f7374cb3fe8000000"
        "00000092a26531a2653292cb3ff8000000000000cb4004000000000000920607920809a2653191a26533a26e319193a46c6f"
        "616492cb400c000000000000cb4012000000000000cb4016000000000000219193cb3ff8000000000000a17481a176cb4004"
        "000000000000119195a26532a26531101e99a27031ce00200000ce00100000cb3fd0000000000000cb3ff4000000000000cb"
        "3ff8000000000000cb414312d000000000c3a56d6f64656ca265311ec309c303cd019091dc0011a862616c616e63656403a6"
        "63616e617279a265310581aa63616368655f66756c6c010203281008099403cbbff8000000000000cb400400000000000081"
        "07039400cb0000000000000000cb0000000000000000809403cbbff8000000000000cb4004000000000000810703cb400400"
        "000000000095040192cb4000000000000000cb3fe000000000000091cb3ff000000000000091cb4008000000000000"
    ),
    "FROM_INDEX.Question": "940d02a27231a862616c616e636564",
    "FROM_INDEX.Asked": "940e0191a6726f7574657291a56f74686572",
    "FROM_INDEX.Explained": (
        "970f01a6726f75746572919fad72312e30613061306130612d30cb401a000000000000a862616c616e63656403c391a47573"
        "657210280511a56572726f72aa63616368655f66756c6c919ea862616c616e63656403cb3fc00000000000002881a2653110"
        "919fa2653191a66465636f646592a26e31c3cd0800050203dc0017cf00000004000000000203040506070809cb4025000000"
        "000000cb3fc0000000000000c340cb3fe8000000000000cb4034800000000000cb3fd8000000000000cd02000bcb3ff40000"
        "00000000cb3fd0000000000000cb3fc0000000000000cb3fd00000000000009192a26532cb413312d000000000cb3fd00000"
        "0000000091a9707265705f7265637699a862666c6f61743136a26f31101e0340a3667038b364656661756c74207468657461"
        "3d3130303030a264310802a66e6174697665a26331919ccb3fe0000000000000a66465636f6465a4636f7374cb3fe8000000"
        "00000092a26531a2653292cb3ff8000000000000cb4004000000000000920607920809a2653191a26533a26e319193a46c6f"
        "616492cb400c000000000000cb4012000000000000cb4016000000000000219193cb3ff8000000000000a17481a176cb4004"
        "000000000000119195a26532a26531101e99a27031ce00200000ce00100000cb3fd0000000000000cb3ff4000000000000cb"
        "3ff8000000000000cb414312d000000000c3a56d6f64656ca265311ec309c303cd019091dc0011a862616c616e63656403a6"
        "63616e617279a265310581aa63616368655f66756c6c010203281008099403cbbff8000000000000cb400400000000000081"
        "07039400cb0000000000000000cb0000000000000000809403cbbff8000000000000cb4004000000000000810703cb400400"
        "000000000095040192cb4000000000000000cb3fe000000000000091cb3ff000000000000091cb4008000000000000"
    ),
}
