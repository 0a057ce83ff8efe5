"""What a strategy does at engines for one request, each action checked before anything is sent.

Owns the handle of one engine (engine.py), a grant and the sends that fill it (grant.py), an answer that
runs (generating.py), and several of them of which one goes on (race.py). Must not know how an engine is
picked (../mesh.py), or what a plan keeps. Start at engine.py.
"""
