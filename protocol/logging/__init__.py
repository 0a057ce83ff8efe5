"""How a process says what happens: events in, JSON lines out, and never in the way of what serves.

Owns the one place where loggers are made, the queue and the thread behind them, files and their rotation,
what is left out of a flood, and what others print. Must not know what an event means: names are in
``../log.py``.

    a call -> encoded -> bounded queue -> one thread -> a file (rotated, reopened) or stderr (journald)

A call never raises and never waits; what cannot be written is counted, and said when there is room again.
Start with setup.py (``configure``), then writer.py (the queue and its thread), sink.py (where lines go),
sampling.py (what a flood leaves out), capture.py (stdout and stderr as events), printable.py (terminals).
"""
