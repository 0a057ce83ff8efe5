"""Symmetric heaps: one engine owns each, others put KV into it without asking.

Owns one interface with three promises (heap.py: Order, Holding, Proof) and its kinds: local.py (one process,
for tests and the simulation), shm.py over memfd.py (a host), cuda_ipc.py over device.py (GPUs of a host),
nvshmem.py (GPUs of one world). Must not know grants, prefixes or the engine; one conformance suite holds
every kind. Start at heap.py; factory.py is the front door: it makes the heap that the settings ask for.
"""
