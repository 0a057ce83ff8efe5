"""KV memory: who holds which block, which prefix is where, who may write, and the memory itself.

Owns the pool and its quarantine (block_pool.py), where a token's KV lies (layout.py), the control words
beside it (words.py), and four rooms: prefix/ (identity and reuse), grant/ (the right to write into another
engine), heap/ (memory that others write into), codec/ (KV made small for a link). All of it decides and does
no I/O but mapping memory and reading a library of codecs, and at the doors of heaps (heap/doors/) alone it
has sockets and threads: must not know asyncio, ZeroMQ, requests' routes or a model. Start at block_pool.py,
then grant/table.py.
"""
