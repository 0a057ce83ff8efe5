"""OpenAI's two kinds of completion as JSON: what may be asked, what each field means, how an answer looks.

Owns schemas, defaults, limits that depend on the model, and the bytes of chunks and replies. Must not send
or await anything of the mesh: whoever calls it does.

Start with ``schema.py`` (a request's fields and their bounds) and ``parse.py`` (how bytes become one), then
``sampling.py`` (what they come to) and ``answer.py`` (what both kinds of answer share); ``chat.py`` and
``completions.py`` are one kind each: its prompts and its format.
"""
