"""What is in force and how it fares, as people read it.

Owns ``list``, ``show`` and ``history`` (look.py), ``compare`` (compare.py), and the lines of both: of
versions and labels (table.py), of how versions fare (score_table.py). Must not change anything, nor run a
source. Start at look.py.
"""
