"""One generation request: where HTTP, text and routers meet.

Owns the order of things, a request's deadline and room, and its account in the end. Must not know how
bytes are framed or how a router is found: each of these is a room of its own.

Start with ``completion.py`` (from the body to the last byte), then ``group.py`` (its choices on the bus),
``accounting.py`` (usage, metrics) and ``summary.py`` (the canonical line and its phases).
"""
