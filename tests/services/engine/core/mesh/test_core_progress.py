"""Whatever an engine has promised, it can always go on: no order of requests stops it for good."""

from __future__ import annotations

from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import Mesh, expect, generate, grant_for, prompt_of, receive, send

LONG = SamplingParams(max_tokens=70, temperature=0.0, ignore_eos=True)


def test_a_preempted_sequence_never_blocks_the_send_that_frees_its_blocks() -> None:
    """Its own grants pin what the head of the queue needs, and what fills them waits behind it."""
    mesh = Mesh(num_blocks=24)
    engine, old, new = mesh.a, prompt_of(12), prompt_of(40, seed=1)
    generate(engine, "old", old, LONG)
    while len(engine.tokens.get("old", [])) < 40:
        mesh.now += 0.001
        engine.step()
    granted = grant_for(engine, "new", new, 36)
    while not engine.core.state.counters["preemptions"]:
        mesh.now += 0.001
        engine.step()
    send(engine, "new", new, granted, 0, 36)
    receive(engine, "new", granted, 36)

    mesh.run()

    assert engine.tokens["new"] == expect(new)
    assert engine.tokens["old"] == expect(old, LONG)
    mesh.close()
