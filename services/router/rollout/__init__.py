"""Which version of a strategy serves a request: what operators publish, and how it fares.

Owns the choice of a version for a request (book.py: stable, canary by lot, shadow), the loading and swapping
of published versions (control.py), the window that judges them (window.py), and shadows: versions that decide
and serve nothing (shadow.py, shadow_engine.py), priced by score.py. Must not know gateways, sockets or how a
request is served. Start at book.py, then control.py.
"""
