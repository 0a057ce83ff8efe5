"""Symmetric heaps: one engine owns each, others put KV into it without asking.

Owns one interface with three promises (heap.py: Order, Holding, Proof) and its kinds: local.py (one
process, for tests and the simulation), shm.py over memfd.py and mapped.py, which copies (a host), gpu/
(GPUs of a host, and of one world), doors/ (ways into a host's heap from other hosts); process.py proves an
owner dead. Must not know grants, prefixes or the engine; one conformance suite holds every kind. Start at
heap.py. factory.py makes the heap that the settings ask for, but one of a world, which nobody makes alone
(services/engine/world.py).
"""
