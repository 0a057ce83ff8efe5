"""``microserve doctor``: what is wrong with a mesh, where, and how it is mended.

Owns what is looked at (observation.py: plain data), what is wrong about it (judging*.py: pure functions), and
how it is found out: who answers at an address (reach.py), what index, routers and each engine say (look.py),
what gateways say (gateways.py), what a transfer and a cache do (trying.py). Serves nobody and changes
nothing: what it computes is its own, and given back. Must not mend anything itself. Start at observation.py,
then judging.py; table.py is what is printed.
"""
