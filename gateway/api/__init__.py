"""What every HTTP API of the gateway is made of: a body's way in, an answer's way out.

Each API is a room that is a pair of pure functions: body -> ``GenerateRequest``, and an ``AnswerFormat``.
Here is how bytes become a body, types that bodies share, and what an answer is made of. Must not know any one
API; nor do they know each other.

Start with ``dialect.py`` (what an API's room gives), then ``parse.py`` (bytes to a body; ``fields.py``: types
of its fields, ``arguments.py``: JSON within one) and ``format.py`` (what an answer is made of).
"""
