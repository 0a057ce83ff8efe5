"""The engine without its sockets: what is asked, what runs next, what a step brings.

Owns the state behind one lock (core.py, state.py), the actions as state changes (actions.py), the scheduler
(scheduler.py), the border of steps (stepper.py), what blocks mean (memory.py), and whom it writes to
(peers.py). Time comes from the core's one clock. Must not know sockets, asyncio or tensors: a step is a Batch
(batch.py) that somebody runs. Start at core.py, then actions.py, then stepper.py.
"""
