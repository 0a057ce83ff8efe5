"""``microserve strategy``: sources checked and published, versions changed, what is in force shown.

Owns names, flags, what is printed and exit codes (0 done, 1 failed, 2 a flag or a setting is wrong). A source
is run only by check_process.py, in a process of its own; what is said to the index is ../control_client.py's.
Must not know how routers judge versions. Start at group.py (every command), then publish.py (check.py before
it), change.py (what is in force), look.py (what is shown; table.py says it in lines).
"""
