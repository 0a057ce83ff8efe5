"""Prefill in another cluster: how much two clusters serve, where lengths part, what one request does.

Owns the throughput model of PrfaaS (arXiv 2604.15039) and both paces at which it is used: a planner's, which
searches all of (threshold, prefill engines, decode engines) by it (planner.py), and a router's, whose
threshold goes as the link goes (threshold.py) and is planned anew as lengths drift (drift.py). Sans-I/O: no
sockets, no clock. Must not know engines, routers or strategies: they give it numbers. Start at planner.py,
then profile.py.
"""
