"""vLLM's compiled model calls the connector for every layer, as its eager one does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from microserve.services.engine.vllm.link import Received, Sent
from tests.support.vllm.exchange import assert_equal, kv_of, prompt_of
from tests.support.vllm.hosted import Hosted, Peer

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def compiled(vllm_python: Path, model: Path) -> Iterator[Hosted]:
    """As vLLM is when nobody says ``enforce_eager``: it takes a minute to start."""
    hosted = Hosted(vllm_python, model, enforce_eager=False)
    try:
        hosted.start()
        yield hosted
    finally:
        hosted.close()


def test_every_layer_of_every_step_is_counted_and_sent(compiled: Hosted) -> None:
    num_layers = compiled.layout.num_layers
    compiled.generate(prompt_of(40, seed=9), max_tokens=2)  # what it compiles with is no step of a request
    before = compiled.front.page.progress()
    compiled.generate(prompt_of(40, seed=10), max_tokens=6)
    assert compiled.front.page.progress().layers - before.layers == 6 * num_layers

    peer = Peer(compiled.layout)
    try:
        prompt = prompt_of(300, seed=1)  # two chunks
        expected = compiled.generate(prompt, max_tokens=4)["tokens"]
        compiled.forget()
        grant = peer.grant(300)
        request_id, _ = compiled.send(prompt, grant)
        blocks: list[int] = []
        while not compiled.notices(Sent):
            compiled.step()
            blocks = compiled.call("block_ids", request_id) or blocks
        assert_equal(kv_of(compiled.heap, blocks), kv_of(peer.heap, grant.blocks))
        peer.verify(grant)
        compiled.settle()
        compiled.forget()
        _, receive, theirs = compiled.receive(prompt)
        peer.put(compiled, theirs, grant.blocks)
        compiled.verify(theirs)
        compiled.front.page.take(receive)
        assert compiled.generate(prompt, after=receive, max_tokens=4)["tokens"] == expected
        compiled.hear(Received)
    finally:
        peer.close()
