"""What an answer's text may be: from what is asked for to a grammar that engines enforce, or a 400.

Owns what can be asked for, what is relaxed and told, and the memory of what was checked.
The check itself compiles, so it is done in a helper. Must not know engines or any API; what a grammar means
is ``protocol/grammar``'s.

Start with ``asked.py`` (a wish to a grammar), then ``checker.py`` (asks the helper, remembers) and
``checking.py`` (in the helper: compiled, or refused by keyword and path).
"""
