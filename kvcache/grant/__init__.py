"""A grant: the right to write KV into another engine's blocks, from both ends.

Owns the receiver's book of grants (table.py: opened, on blocks that
services/engine/core/memory.py:open_grant took for it, closed and quarantined; pool.py: whose they are), what
has arrived by the words that writers leave (arrival.py), the sender's lane (writer.py: where a layer is put;
services/engine/core/core.py asks for it as the layer finishes), and the sum that proves a block whole
(checksum.py). The rule that all keep: blocks that a writer may still reach are never reused (ARCHITECTURE.md
says why). Must not know the kind of heap, sockets or sequences. Start at table.py.
"""
