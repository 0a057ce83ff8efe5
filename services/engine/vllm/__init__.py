"""vLLM as an engine: its ``AsyncLLM`` behind our shell, its KV cache as our heap.

Owns which settings are which of vLLM's arguments (arguments.py), what front and connector say to each other
(link.py, and its ends in link_ends.py) and the connector that vLLM loads (connector/). Runs in vLLM's
environment, without our torch. Must not know routers or strategies. Start at link.py.
"""
