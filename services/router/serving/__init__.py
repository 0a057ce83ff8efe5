"""A request from its admission to its one end.

Owns the refusals (admission.py: bounds, and time against the work ahead), the live requests and their tasks
(serving.py, live.py), one run of a strategy, where its exceptions end (attempt.py), and whether and on which
terms another run follows (failover.py). Must not know sockets: a gateway is an owner and a sink. Whatever
happens, the scope is closed before the end is told. Start at serving.py.
"""
