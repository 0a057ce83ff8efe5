"""Settings: every value that an operator may set, where it comes from, and what is said of a wrong one.

Owns the sections with defaults, bounds and a sentence each (settings.py; an engine's: engine.py, vLLM's:
vllm.py, a gateway's: gateway.py; made of bounds.py), their sources (sources.py) and their faults
(faults.py). Must not know what a setting does: classes are given the numbers they need, never ``Settings``.
Start at settings.py.
"""
