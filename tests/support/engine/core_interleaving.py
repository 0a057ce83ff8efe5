"""Random requests, splits, steps and aborts on two engine cores, for meshes of any kind."""

from __future__ import annotations

import random

from microserve.protocol.errors import CacheFull, PromptTooLong, QueueFull
from microserve.protocol.messages import engine as wire
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.engine.core_mesh import (
    ROUTER,
    Engine,
    Mesh,
    expect,
    generate,
    grant_for,
    prompt_of,
    receive,
    send,
)

_IS_HELD = "is held by another writer"


def interleave(mesh: Mesh, rng: random.Random, num_requests: int) -> None:
    """Every answer that was not aborted is right, and nothing is left when the mesh is closed."""
    stems = [prompt_of(40, seed=s) for s in range(2)]
    wanted: dict[str, tuple[Engine, list[int], SamplingParams, int | None]] = {}
    first_calls: dict[str, tuple[Engine, int]] = {}
    calls: dict[str, tuple[Engine, int]] = {}
    aborted: set[str] = set()
    for number in range(num_requests):
        request_id = f"r{number}"
        prompt = stems[rng.randrange(2)][: rng.randrange(1, 40)] + prompt_of(rng.randrange(0, 8), seed=number)
        params = SamplingParams(
            max_tokens=rng.randrange(1, 12), temperature=rng.choice([0.0, 1.0]), seed=number, ignore_eos=True
        )
        here, there = (mesh.a, mesh.b) if rng.random() < 0.5 else (mesh.b, mesh.a)
        if rng.random() < 0.1:
            there = here
        try:
            if rng.random() < 0.4:
                generate(here, request_id, prompt, params)
            else:
                end = rng.choice([len(prompt), rng.randrange(len(prompt) + 1)])
                granted = grant_for(here, request_id, prompt, end)
                await_first = end == len(prompt) and granted.grant.matched < end and rng.random() < 0.7
                receive(here, request_id, granted, end, params, await_first=await_first)
                if granted.grant.matched < end:
                    call = send(
                        there, request_id, prompt, granted, 0, end, sampling=params if await_first else None
                    )
                    calls[request_id] = (there, call)
                    if await_first:
                        first_calls[request_id] = (there, call)
            wanted[request_id] = (here, prompt, params, None)
        except (CacheFull, QueueFull, PromptTooLong):
            aborted.add(request_id)
        for _ in range(rng.randrange(4)):
            mesh.now += 0.001
            rng.choice([mesh.a, mesh.b]).step()
        if rng.random() < 0.2:
            engine = rng.choice([mesh.a, mesh.b])
            victim = f"r{rng.randrange(number + 1)}"
            aborted.add(victim)
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), victim), mesh.now)
            engine.collect()
    for victim in aborted:  # a router's abort reaches every engine in the end
        for engine in (mesh.a, mesh.b):
            engine.core.actions.abort(ROUTER, wire.Abort(mesh.call(), victim), mesh.now)
    mesh.run(limit=5000)
    for request_id, (engine, call) in calls.items():
        reply = engine.replies.get(call)
        if mesh.lanes_linger and isinstance(reply, wire.Failed) and reply.detail.endswith(_IS_HELD):
            aborted.add(request_id)

    for request_id, (engine, prompt, params, _) in wanted.items():
        finished = engine.finished.get(request_id)
        if request_id in aborted:
            continue
        assert finished is not None and finished.reason == "length", finished
        got = engine.tokens[request_id]
        if (got and got[0] == -1) or (not got and request_id in first_calls):
            sender, call = first_calls[request_id]
            sent = sender.replies[call]
            assert isinstance(sent, wire.Sent) and sent.first_token is not None
            got = [sent.first_token, *got[1:]]
        assert expect(prompt, params) == got
    mesh.close()
