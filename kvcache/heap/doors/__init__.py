"""Doors: ways into a heap for writers on other hosts, who cannot map its memory.

Owns what a door is (door.py), a host's heap with its doors (host.py: which of a heap's addresses a writer
takes, and what an engine opens), and the kinds of door: ``tcp/``, ``nixl/``. A door writes on behalf of its
writers as any process of the owner's host would: through a mapping of the memfd, and with the lanes' byte
locks in it. So a lane is never granted twice, whichever way its writers come, and ``ShmHeap.is_held`` says
the truth without asking a door. Must not know grants or the engine. Start at door.py.
"""
