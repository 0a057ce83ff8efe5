"""Anthropic's Messages API as JSON: what may be asked, what each field means, how an answer looks.

Owns schemas, what a conversation of blocks is to a chat template, Anthropic's words for errors, and the bytes
of events and replies. Must not send or await anything of the mesh, nor know the rooms of other APIs.

Start with ``schema.py`` (a request's fields and their bounds), then ``request.py`` (what they come to), which
is made of ``conversation.py`` and ``tools.py``; ``answer.py`` is the way out, made of ``blocks.py``.
``errors.py`` is how every refusal on these paths looks.
"""
