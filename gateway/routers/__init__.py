"""The bus side: requests to the least busy router, tokens back, and on to another router when one is lost.

Owns connections, credit, who is alive, and what must be sent again. Knows token ids, not text; must not
know HTTP or the other rooms. Its clock is handed in and it waits by the loop alone, so that the simulation
runs this very code in virtual time (services/simulation/gateway.py).

Start with ``client.py`` (which router takes a request), then ``link.py`` (one router: hello, credit,
loss), ``mailbox.py`` (where tokens wait for their reader) and ``failover.py`` (requests whose router is
lost).
"""
