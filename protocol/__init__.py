"""What two processes must agree on, and how a process speaks at all.

Owns the wire (``WIRE.md``, the contract), the messages, the sockets under them, the settings, the errors
that have a code, how a service process starts and ends, and how it says what happens. Must not know what a
block, a strategy or a token's text is.

Start with ``WIRE.md``, then ``messages/`` (what is said), ``bus/`` (how it travels), ``process/`` (how a
service runs), ``logging/`` (what it says); ``settings/``, ``errors.py``, ``log.py``, ``types.py`` and
``smoothing.py`` are used by all; ``request_id.py`` has the names of a request.
"""
