"""The engine: a shell with sockets over a core without, over a model.

Owns one process that holds a model and its KV: the shell (shell/), the thread of our core's steps
(step_thread.py), its NVSHMEM world if it has one (world.py, rendezvous.py), all of it made in service.py;
its model comes by loading.py, where need be with as little of torch as will do (lean_import.py). Rooms:
core/ (state, actions, steps), model/ (tensors), native/ (packed weights, steps without torch). Must not
know routers, the index's code, or strategies. Start at core/core.py; the shell is what is around it.
"""
