"""``microserve tail``: what happened to requests, and what happened, across all services.

Owns which lines are shown, merged by their times (command.py), and how they look on a terminal
(columns.py). Must not know how lines are written (protocol/logging/). Start at command.py.
"""
