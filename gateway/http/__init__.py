"""HTTP as this gateway speaks it, above and below ASGI; not what is said.

Owns uvicorn and its bounds, TLS, one request's body and answer, event streams, and which status each error
becomes. Must not know models, text or the bus (but for the one error that only a router's client
has).

Start with ``exchange.py`` (one request and its answer; where errors become answers), then ``sse.py``
(streams) and ``errors.py`` (the table). ``server.py`` is the only file that knows uvicorn; ``tls.py`` the
certificate.
"""
