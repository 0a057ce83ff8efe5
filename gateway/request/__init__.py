"""One request as everything behind an API understands it, whichever API it came by.

Owns the type that all APIs' bodies become, what its fields come to (token ids, sampling, attributes), and
what is said where they cannot be served, by the names that its client used. Must not know any API's body or
answer, HTTP, or how a request is sent.

Start with ``request.py`` (the type), then ``prompts.py`` (to token ids), ``sampling.py`` (to what engines are
told; ``defaults.py`` for what it leaves open), ``reading.py`` (how its answers are read) and
``attributes.py`` (what strategies may know of it).
"""
