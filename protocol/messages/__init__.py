"""Every message of the mesh, as plain data: one file a conversation, fields in their order on the wire.

Owns shapes, bounds and defaults; positional structures only grow at their end (WIRE.md 8). Must not know
frames, sockets or what anybody does with a message: ``bus/codec.py`` puts them into frames.

Start with ``engine.py`` (router and engine: the three actions), then ``router.py`` (gateway and router),
``index.py`` (everybody and the index). Parts of these: ``request/`` travels with a request, ``kv/`` is
about KV (its events have frames of their own), ``strategy/`` about what decides; ``engine_info.py``,
``numerics.py`` and ``host.py`` are what a service says of itself, ``world.py`` how engines of one meet.
"""
