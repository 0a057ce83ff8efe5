"""Strategies as messages have them: set by operators, decided by, and judged.

Owns what is in force (control.py), why a request went where it went (decisions.py), and how versions fare
(scores.py). Must not know the index's own conversation, which carries them. Start at control.py.
"""
