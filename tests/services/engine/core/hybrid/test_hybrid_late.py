"""Two writers bring one grant, as both may: what the second one writes when what the first one brought is in
use."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from microserve.kvcache.grant.writer import LaneWriter
from tests.support.engine.core_mesh import grant_for, prompt_of, receive, send
from tests.support.engine.hybrid_hash import HybridHashMesh, expect


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("length", [13, 21])
def test_a_late_writer_of_the_same_state_changes_no_token(
    monkeypatch: pytest.MonkeyPatch, layer: int, length: int
) -> None:
    mesh = HybridHashMesh()
    prompt = prompt_of(length)
    granted = grant_for(mesh.b, "r", prompt, length - 1)
    late: list[Callable[[], object]] = []
    writers: list[LaneWriter] = []
    put, finish = LaneWriter.put_layer, LaneWriter.finish

    def put_late(self: LaneWriter, at: int, blocks: list[int], *more: object) -> int:
        if self._lane == 0:
            return put(self, at, blocks, *more)  # type: ignore[arg-type]
        writers.append(self)
        if at == layer:
            late.append(partial(put, self, at, list(blocks), *more))  # type: ignore[arg-type]
        return 0

    with monkeypatch.context() as patch:
        patch.setattr(LaneWriter, "put_layer", put_late)
        patch.setattr(LaneWriter, "finish", lambda self: None if self._lane else finish(self))
        send(mesh.a, "r", prompt, granted, 0, length - 1, lane=0)
        send(mesh.a, "r", prompt, granted, 0, length - 1, lane=1)
        receive(mesh.b, "r", granted, length - 1)
        while len(mesh.b.tokens.get("r", [])) < 2:
            mesh.a.step()
            mesh.b.step()
            mesh.now += 0.001
    assert late and "r" not in mesh.b.finished
    [sequence] = mesh.b.core.state.scheduler.running
    assert sequence.received is not None, "the second writer holds its lane"
    with monkeypatch.context() as patch:
        patch.setattr(LaneWriter, "require_grant_open", lambda self: None)  # it looked before
        for each in late:
            each()
    mesh.b.step()
    writers[0].finish()
    mesh.run()
    assert mesh.b.tokens["r"] == expect(tuple(prompt), 6)
    mesh.close()
