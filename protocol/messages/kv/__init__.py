"""KV as messages have it: its shape, who may write it, and what caches gained and lost.

Owns the geometry (geometry.py), the grant of a receiver (grant.py), what is said of codecs (coding.py), and
KV events (kv_events.py: what we send; kv_decoding.py: that, and what other people's engines send, read). Must
not know the conversations that carry them. Start at geometry.py.
"""
