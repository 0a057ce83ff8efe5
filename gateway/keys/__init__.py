"""API keys: who a client is, what it may, how much, and what it has used.

Owns names, digests, limits and counts. Must not know HTTP (a header's bytes come in, numbers go out), models,
text or routers. Everything that decides is sans-I/O: ``now`` is handed in.

Start with ``key.py`` (a key and its file's format), then ``ring.py`` (from a header to its key) and
``quota.py`` (what one key may still use; ``bucket.py`` is its arithmetic). ``reader.py`` reads the file anew,
``ledger.py`` keeps what was used, ``salt.py`` says why keys do not share a cache.
"""
