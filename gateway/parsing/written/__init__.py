"""A call's arguments as a family writes them -> the grammar of these. Pure; asks no library.

Owns how JSON Schema becomes terms of Lark where arguments are no JSON: what such a text may be, so that the
reader of the family (``parsing/calls``) makes values of it that fit the schema. Narrower than the schema in
three ways: names in the order of the schema, none that it does not name unless it names none, and no text
that would be read as something else. What cannot be told this way is refused by keyword.

Start with ``lark.py`` (a grammar in the making), then ``schema.py`` (what a value may be: text, or anything
else), ``parameters.py`` (one parameter behind the other) and ``gemma.py`` (a notation of its own).
"""
