"""A simulated engine: the real shell and core, on a heap, a thread and a model that are the simulation's.

Owns one life of an engine (engine.py), its model, which proves that the right KV was read (hash_runner.py;
in meshes of several numerics classes marked_runner.py; under grammars with toy_guides.py), its memory,
where writes are lost, torn and late (heap.py), what must be true of every write (witness.py), and its
thread (steps.py). Must not know the mesh, the bus or gateways. Start at engine.py.
"""
