"""One answer as it grows: tokens come in, visible text goes out, with all that is told of it.

Owns a choice and its end (choice.py, with stop strings by stop.py), thoughts and calls in it (reading.py),
its tokens beside its text (transcript.py), and a prompt's own: what it scored (scored.py), said again
(echo.py). Must not know HTTP or JSON. Start at choice.py.
"""
