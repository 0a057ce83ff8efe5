"""How messages travel: sockets, frames, numbers, credit, keys, and who is at the other end.

Owns everything about a connection that is the same for all services. Must not know what a message asks for,
nor what a service does when a peer is lost; ``peers.py``, ``queue.py``, ``credit.py`` and ``calls.py`` are
sans-I/O.

Start with ``transport.py`` (the ``Bus`` and its sockets, which a simulation replaces) and ``codec.py``
(frames to messages). ``numbered.py`` finds what was lost, ``calls.py`` pairs answers with questions,
``credit.py`` and ``queue.py`` bound token streams, ``peers.py`` says who is alive, ``curve.py`` who may
connect.
"""
