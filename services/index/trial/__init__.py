"""Is a canary better or worse than the version beside it, and what follows from it: ramps.

Owns the sequential tests (comparison.py: times by regression; failures.py: by counts), the sums of all
routers together (merging.py) and the state machine of ramps (ramp.py). All of it is sans-I/O. Must not know
the log, peers or sockets, nor what a strategy is. Start at comparison.py.
"""
