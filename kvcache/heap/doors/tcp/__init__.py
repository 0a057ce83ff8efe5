"""A door of plain TCP: no dependency, and as fast as a stream of bytes between the two hosts.

    writer                                               owner
    peer.py   TcpPeerHeap: put, signal, hold             door.py     one thread for all connections
    line.py   what goes out and what has come, sans-I/O  inbound.py  bytes into the heap, sans-I/O
    post.py   one thread for all connections             frames.py, greeting.py: both sides (WIRE.md 10)

Start at door.py, which says by what fence a late write is impossible.
"""
