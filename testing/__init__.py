"""``microserve.testing``: for the tests of a strategy's author, a mesh in memory under a virtual clock.

    from microserve.testing import Engine, Send, in_memory

    @in_memory("balanced", Engine("p", labels=["prefill"]), Engine("d", labels=["decode"]))
    async def test_a_long_prompt_is_split(mesh):
        answer = await mesh.ask(prompt_tokens=1000)
        assert answer.plan.sends == [Send("p", "d", 0, 900)]
        assert answer.plan.generated_on == "d"

Owns what an author's test may say and ask: engines, requests, faults (mesh.py), what came of a request and
how it was served (answer.py), and how such a test is run (run.py; fixtures.py is the one that needs pytest).
The router, the index and the engines' schedulers are the real ones; services/simulation has what stands in
for the rest. Must not judge a strategy: the check does. Start at mesh.py. docs/authoring.md explains it.
"""

from __future__ import annotations

from microserve.testing.answer import Answer, Picked, Plan, Send
from microserve.testing.mesh import Engine, MeshInMemory
from microserve.testing.run import in_memory

__all__ = ["in_memory", "Engine", "MeshInMemory", "Answer", "Plan", "Send", "Picked"]
