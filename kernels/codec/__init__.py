"""Codecs of KV in C++: payloads' bodies made and read in one call, which lets the interpreter go meanwhile.

Owns the C++ (native/) and its calls (native.py), and the command that builds it ahead (build.py). What is
computed, and in which order things stand, is kvcache/codec's: the same bytes come from numpy there, which
these are held against. Must not know headers, profiles' names nor grants. Start at native.py.
"""
