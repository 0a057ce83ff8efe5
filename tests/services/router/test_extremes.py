"""Any number in any field of any message of a gateway: answered, never raised, and others are served."""

from __future__ import annotations

import pytest
import structlog

from microserve.protocol import log
from microserve.protocol.bus.codec import ROUTER_REQUEST, encode_tokens
from microserve.protocol.messages import router as wire
from microserve.protocol.messages.engine import StartGenerate
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.bus.extremes import extremes
from tests.support.bus.wire_samples import MESSAGES
from tests.support.router.router_world import expected_output, in_loop, router_world

PROMPT = list(range(50))
SAMPLING = SamplingParams(
    max_tokens=4, min_tokens=1, temperature=0.5, top_p=0.75, top_k=40, min_p=0.25, repetition_penalty=1.25,
    presence_penalty=-0.5, frequency_penalty=1.5, logit_bias={50: -2.5}, seed=1 << 40, logprobs=3,
    stop_token_ids=(2, 9),
)  # fmt: skip
REQUESTS = [
    wire.Generate("q", "", SAMPLING, 30.0, num_output_tokens=1),
    *(message for codec, message in MESSAGES if codec is ROUTER_REQUEST),
]


@pytest.mark.slow
@in_loop
async def test_every_number_of_every_request() -> None:
    async with router_world("d") as world:
        with structlog.testing.capture_logs() as logs:
            attacker = world.bus.client(world.router.gateways.address, lambda frames: None)
            hello = ROUTER_REQUEST.encode(wire.GatewayHello("attacker", 9, 64))
            for message in REQUESTS:
                for number, (_, frames) in enumerate(extremes(ROUTER_REQUEST, message)):
                    for each in (hello, [*frames, encode_tokens(PROMPT)], frames):
                        attacker.send(each)
                    attacker.send(ROUTER_REQUEST.encode(wire.Cancel("q")))
                    if number % 20 == 0:
                        assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)
            assert (await world.gateway.generate(PROMPT)).token_ids == expected_output(4)
        failed = [each for each in logs if each["event"] in (log.BUS_HANDLER_FAILED, log.SERVICE_FAILED)]
        assert failed == []
        started = world.engines["d"].of(StartGenerate)
        assert len(started) > 20
        for each in started:  # nothing went on that an engine could not take
            each.sampling.validate(1000)
