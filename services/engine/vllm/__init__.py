"""vLLM as an engine: its ``AsyncLLM`` behind our shell, its KV cache as our heap.

Owns the process from its settings to its end (service.py; arguments.py: which settings are which of vLLM's;
weights.py: what the model's name stands for), the front between shell and vLLM (front/), vLLM's KV events
under our hashes (feed.py, mirror.py), what front and connector say to each other (link.py, and its ends in
link_ends.py) and the connector that vLLM loads (connector/). Runs in vLLM's environment, without our torch.
Must not know routers or strategies. Start at service.py.
"""
