"""Any number in any field of any message: answered, never raised, and what runs meanwhile is served."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from microserve.protocol.bus.codec import ENGINE_REPLY, ENGINE_REQUEST, encode_tokens
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from microserve.services.simulation.engine.hash_runner import expected_tokens
from tests.services.engine.shell.test_action_server import PARAMS, PROMPT, VOCAB, Rig, tokens_of
from tests.support.bus.extremes import extremes
from tests.support.bus.wire_samples import MESSAGES

SAMPLING = SamplingParams(
    max_tokens=3, min_tokens=1, temperature=0.5, top_p=0.75, top_k=40, min_p=0.25, repetition_penalty=1.25,
    presence_penalty=-0.5, frequency_penalty=1.5, logit_bias={50: -2.5}, seed=1 << 40, logprobs=3,
    stop_token_ids=(2, 9),
)  # fmt: skip
REQUESTS: list[Any] = [
    wire.StartGenerate(2, "q", 0, SAMPLING, 30.0, num_output_tokens=2),
    wire.PrepRecv(2, "q", 20, 30.0),
    *(message for codec, message in MESSAGES if codec is ENGINE_REQUEST),
]


@pytest.fixture
def rig() -> Iterator[Rig]:
    rig = Rig()
    yield rig
    rig.close()


@pytest.mark.slow
def test_every_number_of_every_request(rig: Rig) -> None:
    rig.hello(peer=b"well")
    count = 0
    for message in REQUESTS:
        for where, frames in extremes(ENGINE_REQUEST, message):
            count += 1
            rig.core.state.draining = False
            rig.hello()
            for bulk in ([], [encode_tokens(PROMPT)]):
                try:
                    rig.socket.receive(b"p", [*frames, *bulk])
                    rig.run()
                except Exception as error:
                    pytest.fail(f"{where}, {len(bulk)} bulk frames: {error!r}")
            for _, reply in rig.socket.sent:
                ENGINE_REPLY.decode(reply)
            rig.socket.sent.clear()
            rig.core.state.drop_owner(b"p", rig.now)
            rig.run()
    assert count > 1000
    rig.core.state.draining = False
    rig.hello(peer=b"well", incarnation=2)
    rig.send(wire.StartGenerate(2, "after", 0, PARAMS, 30.0), encode_tokens(PROMPT), peer=b"well")
    rig.run()
    assert tokens_of(rig.received(b"well")) == expected_tokens(PROMPT, PARAMS, vocab_size=VOCAB)
