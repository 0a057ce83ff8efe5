"""Heaps in device memory: the same three promises, kept by streams instead of loads and stores.

Owns the calls of a CUDA driver (cuda_driver.py), what all such heaps share (device.py), puts by one launch
of a kernel (kernel_put.py), and the two kinds: GPUs of one host (cuda_ipc.py), GPUs of one NVSHMEM world
(nvshmem.py, with its places and how a world comes about: nvshmem_places.py, nvshmem_world.py). Must not
know grants, or the engine's settings. Start at device.py.
"""
