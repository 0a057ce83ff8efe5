"""What a model's answer says: text, what it thought, which tools it calls. Text in, events out; no I/O.

Owns how families of models mark these (``families.py``: a few lines each) and what a client is told of it.
Must not know HTTP, JSON of an API, routers, or how tokens become text; a marker that is a token of its own
comes in as one character that no text has.

Start with ``events.py`` (what comes out) and ``reader.py`` (one answer as it grows), which is made of
``regions.py`` (where a marked text begins and ends; ``openness.py``: and where a marker is a part of a value)
and ``calls.py`` (a marked text -> a call, whose values ``typed.py`` reads where their types are not written);
``parsers.py`` is what one model needs, found from its chat template.

``required.py`` is the other way: the grammar of an answer in which calls are made, or fit; ``written/`` has
those of its arguments that are no JSON.
"""
