"""Constrained decoding: which tokens may come next, so that the output is one of the request's grammar.

Owns grammars from a request to the mask of a position: the pool that compiles them off the step thread, one
guide a sequence. A guide is brought up to the tokens that a sequence has whenever a mask is asked for, so
preemption, failover and a moved sequence need no word of it. Must not know steps, KV or routers.

Start with ``guide.py`` (the interface, and what ends and ``min_tokens`` do to a mask), then ``pool.py``
(compiling: a queue, its threads, its cache) and ``matching.py`` (llguidance behind the interface).
"""
