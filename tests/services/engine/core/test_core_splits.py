"""Every split border of long prompts, at the engine's block size, with prefix-cache hits on both sides."""

from __future__ import annotations

import pytest

from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.sampling import SamplingParams
from tests.support.engine.core_mesh import GREEDY, Mesh, expect, generate, grant_for, prompt_of, receive, send

BLOCK = 16
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
OPTIONS = {"block_size": BLOCK, "num_blocks": 280, "max_model_len": 1200, "max_num_batched_tokens": 512}


def borders(length: int) -> list[int]:
    """0, +-1 around every block edge, length - 1, length."""
    near = {edge + step for edge in range(0, length + 1, BLOCK) for step in (-1, 0, 1)}
    return sorted(b for b in near | {0, length - 1, length} if 0 <= b <= length)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 257, 1023])
@pytest.mark.parametrize("here", ["none", "part", "all"])
def test_every_border_is_exact(length: int, here: str) -> None:
    prompt, whole = prompt_of(length), length // BLOCK * BLOCK
    amounts = {"none": 0, "part": whole // 2 // BLOCK * BLOCK, "all": whole}
    # The long prompt meets each state of the sender with one state of the receiver, the others with all.
    senders = {amounts[here]} if length > 300 else set(amounts.values())
    expected = expect(prompt)
    for there in senders:
        mesh = Mesh(**OPTIONS)
        for border in borders(length):
            # Each split starts from exactly these caches.
            for engine, cached in ((mesh.b, amounts[here]), (mesh.a, there)):
                engine.core.memory.cache.clear()
                if cached:
                    generate(engine, f"warm{border}", prompt[:cached], ONE)
            mesh.run()
            request_id = f"r{border}"
            granted = grant_for(mesh.b, request_id, prompt, border)
            matched = granted.grant.matched
            assert min(amounts[here], border // BLOCK * BLOCK) == matched
            first_there = border == length and matched < border
            receive(mesh.b, request_id, granted, border, await_first=first_there)
            sampling = GREEDY if first_there else None
            call = send(mesh.a, request_id, prompt, granted, matched, border, sampling=sampling)
            mesh.run()
            got = mesh.b.tokens[request_id]
            if first_there:
                sent = mesh.a.replies[call]
                assert isinstance(sent, wire.Sent) and sent.first_token is not None
                got = [sent.first_token, *got[1:]]

            assert expected == got, (there, border)
        mesh.close()
