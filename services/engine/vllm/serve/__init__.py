"""A stock ``vllm serve`` that somebody else runs, as an engine of the mesh: whole requests, and no transfer.

Owns just enough of HTTP to ask it (http.py), its tokens-in, tokens-out endpoint as the front's ``Llm``
(served.py), the core that the shell asks (core.py), and the process (service.py). Runs in MicroServe's own
environment, without torch. Must not know KV, grants or the connector. Start at service.py.
"""
