"""What a sender knows of a transfer, as its controller is asked."""

from __future__ import annotations

import math

import pytest

from microserve.kvcache.codec.choice.decision import Reason
from microserve.protocol.messages import engine as wire
from microserve.services.engine.core.coding.choice import CodecOptions
from tests.support.engine.core_mesh import Mesh, grant_for, prompt_of

SLOW = 1e4
"""Bytes a second."""


class CodingMesh(Mesh):
    codecs = CodecOptions(num_threads=0)


@pytest.mark.parametrize(
    ("rate", "within_s", "reason"),
    [
        (SLOW, 0.0, Reason.MODEL),
        (SLOW, 60.0, Reason.MODEL),
        (SLOW, 1e-6, Reason.NONE_FEASIBLE),
        (SLOW, -1.0, Reason.MODEL),
        (SLOW, math.nan, Reason.MODEL),
        (0.0, 0.0, Reason.UNKNOWN_LINK),
        (1e12, 0.0, Reason.MODEL),
    ],
)
def test_auto_goes_by_the_link_and_by_the_time_allowed(rate: float, within_s: float, reason: Reason) -> None:
    mesh = CodingMesh(width=64)
    prompt = prompt_of(50)
    granted = grant_for(mesh.b, "r", prompt, 49)
    message = wire.RemoteSend(1, "r", 0, 49, granted.grant, 0, 60.0, None, codec="auto", within_s=within_s)
    outgoing = mesh.a.core._codecs.outgoing(message, 49, rate)
    assert outgoing is not None and outgoing.decision.reason is reason
    assert outgoing.decision.is_encoded is (rate == SLOW and reason is Reason.MODEL)
    assert outgoing.decision.slo_s == (within_s if within_s > 0 else math.inf)
    mesh.close()
