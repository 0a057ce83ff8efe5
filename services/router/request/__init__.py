"""One request in a router, and everything that it holds.

Owns the request as strategies see it (request.py: immutable, the one place where intervals are resolved),
what it holds on engines and gives back at its end (scope.py; Abort goes by services/links/engine.py), where
its time went (phase.py) and what was decided about it (decision.py). Must not know strategies, gateways or
other requests. Start at scope.py: no leak can happen that it does not see.
"""
