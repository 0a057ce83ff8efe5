"""OpenAI's Responses API: items in, items out.

Owns its bodies and their items, what these are in the core's own words, and a response's bytes, whole or as
events. Must not know another API, nor send or await anything: whoever calls it does.

Start with ``schema.py`` (a request's fields and their bounds), then ``asking.py`` (a body to a request, with
``items.py`` and ``tools.py``) on the way in, ``output.py`` (the items that an answer grows) and ``format.py``
(its bytes) on the way out. ``ids.py`` is how all of them are called, ``replies.py`` how they look.
"""
