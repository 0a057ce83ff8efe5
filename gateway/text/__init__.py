"""Text and token ids: the only room that knows the model's vocabulary.

Owns tokenising (in threads), chat templates, and the way back: bytes cut anywhere, stop strings, the end.
Must not know HTTP, JSON or links; it takes what a mailbox hands out.

Start with ``choice.py`` (one of a request's ``n`` answers as it grows), then ``detokenizer.py`` (ids to
text) and ``stop.py`` that it is made of. ``tokenizer.py`` is the model's (text to ids, one token's text),
with ``chat_template.py`` for conversations.
"""
