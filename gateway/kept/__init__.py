"""What is kept of answers between requests: bytes by name, of a key, in a file that gateways share.

Owns the file, its bounds (bytes, count, age) and what happens while it cannot be read or written: nothing
that serves waits for it long. Must not know HTTP, or what the bytes say.

Start with ``shelf.py`` (the file), then ``store.py`` (its thread, and what is told of its failures).
"""
