"""What stands around engines costs: one file a question, over real processes.

Owns gateway and router by request and by token (``control_plane.py``, with ``control_parts/``), start-up,
memory and rest (``start_and_rest.py``), locked sockets (``locked.py``), and what one key that floods costs
the others (``flood.py``). Must not know the other rooms: a script finds only what lies beside it. Start with
``control_plane.py``.
"""
