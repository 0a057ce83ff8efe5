"""What a step needs on a device alone.

Owns graphs of decode steps (decode_graphs.py), sampling there (device_sampler.py) and the parts of a module
that are computed by kernels of this project's own (exact.py). Must not know requests: it takes batches, as
the runner does. Start at decode_graphs.py.
"""
