"""KV made small for a link: what is done to it, and what that was measured to bring and to cost.

Owns the description of a way (profile.py) and what was measured of many of them (library.py).
Must not know engines, sockets, requests or a clock. Start at profile.py.
"""
