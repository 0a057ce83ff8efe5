"""Every family there is, a file a service. docs/metrics.md is made of it (``python tooling/metrics.py
--write``).

Labels are bounded by what an operator has set up: model, engine, strategy, phase, reason, kind of heap. Never
a request, a prompt or a client; the name of an API key at the gateway only. Must not know how anything is
counted.
"""
