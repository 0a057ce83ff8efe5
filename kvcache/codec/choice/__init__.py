"""Which way of making KV small pays for a transfer: predicted from what was measured, corrected by what is
seen.

Owns the question and its answer (decision.py), the prediction and the table of what is best at which rate of
the link (envelope.py), what transfers taught (residuals.py), who missed the time allowed and rests
(guard.py), all of them put together (controller.py), and how fast links are (links.py). Of one sender: a
controller for each receiver. Sans-I/O, without a clock, the same for the same seed. Must not know how KV is
encoded or sent. Start at controller.py.
"""
