"""The index: who is in the mesh, which engine holds which prefix, which strategies serve (WIRE.md 6).

Owns membership, the log of control, the worlds' rendezvous and a replica of every engine's prefix cache.
Must not import engine or router: it reads engines through ``services/links`` as routers do. Nothing but the
control log is durable, and no request waits for an index.

Start with ``service.py`` (the socket and who answers what), then ``membership.py`` (sans-I/O: join,
replace, lose); ``control.py`` over ``control_log.py`` over ``control_state.py`` is a change from its sender
to the fold, ``worlds.py`` stands alone. ``prefixes.py`` is which engine's blocks are
where, ``foreign.py`` engines of other people that are followed.
"""
