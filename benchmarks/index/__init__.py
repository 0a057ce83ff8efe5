"""What the prefix index costs: alone, and beside Dynamo's radix tree.

Owns both questions (``prefix_index.py``, ``prefix_index_peer.py``) and the tree behind a pipe, in an
environment of its own (``index_parts/``). Must not know the other rooms: a script finds only what lies beside
it. Start with ``prefix_index.py``.
"""
