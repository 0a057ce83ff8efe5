"""What operators see of the mesh from a gateway: engines, requests, strategies, keys, health, and what
changes.

Owns what is remembered for it (``requests.py``: the last minutes' canonical lines; ``mesh.py``: what the
index says of engines, and a quarter of an hour of it), its forms in JSON (``forms.py``), who is told what is
new (``feed.py``); the paths under ``/view`` are ../route/view_routes.py's. All but ``index.py``, which has
the socket, is sans-I/O. Must not hold up a request: it is told of one when that is over. Keeps no prompt
and no answer.

Start with ``forms.py``: the page, ``microserve top`` and scripts read these.
"""
