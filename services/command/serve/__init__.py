"""One service in this process: ``microserve engine``, ``index``, ``router`` and ``gateway``.

Owns their flags (command.py), and which function, in whose Python, runs an engine (backend.py). Must not
know how a mesh of them is supervised (services/local/). Start at command.py.
"""
