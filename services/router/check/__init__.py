"""The self-check: one pair of engines after the other is asked a small prompt cold, cached, and with KV that
the other one sent; the answers must be equal.

Owns whose turn it is among pairs and routers (rota.py), what is asked of two engines (question.py), what
equal means (verdict.py), what is remembered of it (book.py), and the task that does it (check.py). The first
three of these but question.py are sans-I/O. Must not know clients' requests, nor stand in their way: it waits
until two engines have nothing waiting, and holds nothing for longer than a few seconds. Who is out of use
because of it is ../engines/suspects.py's, and the index's, which tells all routers. Start at check.py.
"""
