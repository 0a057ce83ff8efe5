"""``microserve chat``: a conversation in a terminal, or one question from a pipe, with any OpenAI-compatible
server.

Owns what was said (conversation.py), what an answer is made of (answer.py), what may be typed (order.py, and
editor.py, which reads it) and how it looks (screen.py, blocks.py). All but session.py (who speaks next),
stream.py (one answer over HTTP) and editor.py is pure. Nothing that a server says reaches the terminal
unescaped: it goes by ../terminal.py. Start at command.py (flags, one shot or a session), then session.py.
"""
