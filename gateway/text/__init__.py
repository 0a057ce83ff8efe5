"""Text and token ids: the only room that knows the model's vocabulary.

Owns tokenising (in threads), chat templates, and the way back: bytes cut anywhere, stop strings, the end.
Must not know HTTP, JSON or links; it takes what a mailbox hands out.

Start with ``answer/choice.py`` (one of a request's ``n`` answers as it grows), then ``detokenizer.py`` (ids
to text, by ``vocabulary.py``: a token's bytes). ``tokenizer.py`` is the model's (text to ids, one token's
text), made of ``prompt/``: chat templates, and words that came before. ``options.py`` is what a client
wants shown.
"""
