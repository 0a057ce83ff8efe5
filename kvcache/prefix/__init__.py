"""Which prefix is where: in one engine's pool, and in all engines of a mesh.

Owns the identity of a block (hash.py: chained over everything before it), an engine's cache (cache.py), the
index over many engines fed by their events (index.py; with owners.py for sets of engines, and prompt.py for
hashes of prompts that begin alike), and the translation of other people's events (foreign.py). Must not know
grants, heaps or who asks; equality is checked on tokens before a block is reused.
Start at hash.py, then cache.py.
"""
