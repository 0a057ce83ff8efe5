"""OpenAI's two kinds of completion as JSON: what may be asked, what each field means, how an answer looks.

Owns schemas, what their fields are in the core's words, and the bytes of chunks and replies. Must not send or
await anything of the mesh, nor know another API.

Start with ``schema.py`` (a request's fields and their bounds; ``messages.py``: what conversations are made
of), then ``common.py`` and ``answer.py`` (what both kinds share, in and out); ``chat.py`` and
``completions.py`` are one kind each: its request and its format.
"""
