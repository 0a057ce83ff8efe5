"""HTTP APIs on one side, routers on the bus on the other: text here, token ids there.

Owns HTTP, text, and a client's stream for as long as it lasts. Must not know engines, KV, strategies or
torch: it imports ``protocol`` and nothing else of ours.

    app -> generation -> state -> helper -> dialects -> openai, responses -> api -> request
    request -> text -> parsing, routers;  grammar          http -> routers (one error), keys

Start with ``app.py`` (paths) and ``dialects.py`` (APIs), then ``generation/completion.py`` (one request from
its first byte to its last), then ``routers/client.py``. ``server.py`` is the order in which a process is made
and closed; ``state.py`` what its handlers share; ``route/`` and ``metrics.py`` are for operators,
``document.py`` is ``/openapi.json``. Of several processes on one port (``gateway.workers``) each is a
gateway: ``worker.py`` is its part of the settings, ``siblings.py`` what they say together.
"""
