"""KV of one layer and some tokens in fewer bytes: what is done to it, the bytes, and what it costs.

Owns what a codec is told (profile.py), its steps (transform.py, quantiser.py, planes.py, pack.py, rans.py,
coder.py), the payload that tells a decoder everything it needs (frame.py), the two calls (codec.py), what
was measured of many profiles (library.py), and the choice of one for a transfer (choice/). Must not know
engines, grants, heaps, sockets, requests nor a clock. A router reads profiles, libraries and the choice: they
import none of the other files. Start at profile.py, then codec.py.
"""
