"""What a grammar of the wire means: its text as llguidance reads it, its bounds, and a matcher made of it.

Owns the one place where a grammar's text is translated and compiled, so that the gateway, which refuses, and
the engine, which constrains, cannot disagree. Must not know sequences, requests or HTTP; imports llguidance
only where it is used.

Start with ``bounds.py`` (what is refused before anything is built), then ``compiled.py`` (a tokenizer, a
matcher whose first masks have been tried).
"""
