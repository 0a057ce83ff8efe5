"""One split of a prompt between two engines, on the heaps of a mesh: what every kind of heap must pass."""

from __future__ import annotations

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import GREEDY, Mesh, expect, generate, grant_for, receive, send

ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)


def check_split(mesh: Mesh, prompt: list[int], end: int, *, here: int, there: int, block_size: int) -> None:
    """``b`` generates behind KV of ``[0, end)`` from ``a``; ``here`` and ``there`` tokens are in their
    caches, and nothing else. With ``end`` at the prompt's end the sender samples the first token."""
    request_id = f"r{end}-{here}-{there}"
    for engine, cached in ((mesh.b, here), (mesh.a, there)):
        engine.core.memory.cache.clear()
        if cached:
            generate(engine, f"warm {request_id}", prompt[:cached], ONE)
    mesh.run()

    granted = grant_for(mesh.b, request_id, prompt, end)
    matched = granted.grant.matched
    assert matched == min(here, end // block_size * block_size)
    first_there = end == len(prompt) and matched < end
    receive(mesh.b, request_id, granted, end, await_first=first_there)
    call = 0
    if matched < end:
        sampling = GREEDY if first_there else None
        call = send(mesh.a, request_id, prompt, granted, matched, end, sampling=sampling)
    mesh.run()

    tokens = mesh.b.tokens[request_id]
    if first_there:
        sent = mesh.a.replies[call]
        assert isinstance(sent, wire.Sent) and sent.first_token is not None
        assert tokens[0] == -1, "the first token came by the sender's answer"
        tokens = [sent.first_token, *tokens[1:]]
    assert expect(prompt, block_size=block_size) == tokens, (request_id, matched)
