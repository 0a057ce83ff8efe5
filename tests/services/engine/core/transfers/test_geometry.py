"""KV of another shape is refused before anything is computed or written."""

from __future__ import annotations

import msgspec
import pytest

from microserve.protocol.errors import TransferFailed
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.kv.geometry import UNSAID
from tests.support.engine.core_mesh import Mesh, grant_for, prompt_of, send

PROMPT = prompt_of(13)


def changed(granted: wire.Granted, **geometry: object) -> wire.Granted:
    theirs = msgspec.structs.replace(granted.grant.geometry, **geometry)
    return wire.Granted(granted.call_id, msgspec.structs.replace(granted.grant, geometry=theirs))


@pytest.mark.parametrize(
    ("geometry", "said"),
    [
        ({"dtype": "bfloat16"}, "dtype: float32 here, bfloat16 there"),
        ({"block_size": 32}, "block_size: 4 here, 32 there"),
        ({"order": "x"}, "order: rows here, x there"),
        ({"quantization": "fp8"}, "quantization: none here, fp8 there"),
    ],
)
def test_a_grant_of_another_geometry_is_refused_with_both_values(
    geometry: dict[str, object], said: str
) -> None:
    mesh = Mesh()
    granted = changed(grant_for(mesh.b, "r", PROMPT, 12), **geometry)

    with pytest.raises(TransferFailed, match=f"KV of engine b is another one: {said}"):
        send(mesh.a, "r", PROMPT, granted, 0, 12)

    mesh.run()
    assert mesh.a.core.progress == 0
    assert not mesh.a.core.state.num_requests
    mesh.close()


def test_a_grant_of_an_older_engine_is_held_to_its_layout_hash() -> None:
    mesh = Mesh()
    granted = grant_for(mesh.b, "r", PROMPT, 12)
    older = wire.Granted(granted.call_id, msgspec.structs.replace(granted.grant, geometry=UNSAID))

    call = send(mesh.a, "r", PROMPT, older, 0, 12)
    mesh.run()

    sent = mesh.a.replies[call]
    assert isinstance(sent, wire.Sent)
    assert sent.heap == granted.grant.heap.kind
    mesh.close()
