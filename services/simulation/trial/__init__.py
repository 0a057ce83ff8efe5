"""A strategy tried before it serves: its source read, and requests served by it in a small simulated mesh.

Owns the list of mistakes (mistake.py), what is seen by reading (reading.py, source_names.py), what it meets
(world.py, dry_run.py), what is refused meanwhile (refusal.py), what it keeps (growth.py), and how all of that
becomes one sentence with file, line and mend (blame.py). Must not know the command line, nor how a real mesh
is asked. Start at mistake.py, then dry_run.py.
"""
