"""KV made small for a link: what is done to it, what that brings and costs, and what pays now.

Owns the description of a way (profile.py), what was measured of many of them (library.py), and the choice
among them per transfer (choice/). Must not know engines, sockets, requests or a clock. Start at profile.py.
"""
