"""Every message of the mesh, as plain data: one file a conversation, fields in their order on the wire.

Owns shapes, bounds and defaults; positional structures only grow at their end (WIRE.md 8). Must not know
frames, sockets or what anybody does with a message: ``bus/codec.py`` puts them into frames.

Start with ``engine.py`` (router and engine: the three actions), then ``router.py`` (gateway and router),
``index.py`` (everybody and the index); ``grant.py``, ``sampling.py``, ``control.py`` and ``world.py`` are
parts of these, ``interval.py`` says what bounds in an action mean, ``kv_events.py`` has frames of its own.
"""
