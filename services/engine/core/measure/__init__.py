"""What is measured of an engine's core as it works: what it has done, how fast it is.

Owns counts that only grow (tally.py), rates, from which routers predict waiting times (rates.py), and what a
share of an engine's time is (share.py). Must not know the state that they are kept in, nor who asks; what a
core holds now is read in ../levels.py. Start at tally.py.
"""
