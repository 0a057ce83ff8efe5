"""A request from its admission to its one end.

Owns the refusals (admission.py: bounds, and time against the work ahead), whose turn it is (turns.py decides,
turnstile.py lets through), the live requests and their tasks (serving.py), the one end that the gateway is
told (live.py), one run of a strategy, where its exceptions end (attempt.py), and whether the client hears of
it or another run follows, and on which terms (failover.py). Must not know sockets: a gateway is an owner and
a sink. Whatever happens, the scope is closed before the end is told. Start at serving.py.
"""
