"""Everything that runs beside the gateway: three services, what they share, and what people run.

``engine`` computes, ``router`` decides by strategies, ``index`` knows who is there and who holds which
prefix: none of the three imports another; ``links`` are the client ends that several of them use. Above
them ``simulation`` runs them in virtual time, ``local`` runs a whole mesh on one machine, ``command`` is
what is typed. Nothing here is imported by the gateway, the KV cache or the protocol.

Start with ``command/main.py``: each command names the one function that it runs. Who is dead is each one's
own verdict, by one rule (``protocol/bus/peers.py``): a router's in ``links/engine.py``, the index's in
``index/membership.py``.
"""
