"""Prefill in another cluster: how much two clusters serve, where lengths part, how many engines do what.

Owns the throughput model of PrfaaS (arXiv 2604.15039) and the search of (threshold, prefill engines, decode
engines) by it. Sans-I/O: no sockets, no clock. Must not know engines, routers or strategies: they give it
numbers. Start at planner.py, then profile.py.
"""
