"""The engine without its sockets: what is asked, what runs next, what a step brings.

Owns the state behind one lock (state.py; of requests: request/), a step from its making to its end
(core.py: it also has each layer put as it finishes, and waits for layers), the actions as state changes
(actions.py; what any engine refuses: checks.py), the scheduler (scheduler.py), the books on both sides of a
step (stepper.py), what blocks mean (memory.py: cached, taken, opened as a grant), the heaps it writes to
(peers.py) and the lanes that it takes there (claims.py). Time comes from the core's one clock. Must not
know sockets, asyncio or tensors: a step is a Batch (batch.py) that somebody runs. Start at core.py, then
actions.py, then stepper.py.
"""
