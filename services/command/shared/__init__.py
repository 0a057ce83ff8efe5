"""What several commands have: flags, the talk with the index, and what a terminal is told.

Owns flags and what becomes of them (flags.py, duration.py), the peer of the index that changes what is in
force (control_client.py), output that commands no terminal (terminal.py), and words that two commands share
(why.py). Must not know any command. Start at flags.py.
"""
