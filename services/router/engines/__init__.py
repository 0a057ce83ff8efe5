"""What this router knows of engines: who is there, how busy, how fast, who holds which prefix.

Owns the connections (registry.py; connection.py is what others use of one), the book of work in flight and
of measured links (load.py), what a first token would take (prediction.py) and the replica of the prefix index
(prefix.py). All of it but the registry and the replica's feeds is sans-I/O. Must not know a request, a
strategy or a version: it is asked by tokens and engine ids. Start at registry.py.
"""
