"""Which prefix is where: in one engine's pool, and in all engines of a mesh.

Owns the identity of a block (hash.py: chained over everything before it), an engine's cache (cache.py), the
index over many engines fed by their events (index.py), the form of ours (own_events.py), and the translation
of other people's (foreign.py). Must not know grants, heaps or who asks; equality is checked on tokens before
a block is reused. Start at hash.py, then cache.py; for the index at blocks.py.

    native/   hashes and blocks in C++: sha256.h, table.h, module.cc    build.py, extension.py   made, loaded
    python_blocks.py   the same in Python, with owners.py (sets of engines) and prompt.py (prompts alike)
"""
