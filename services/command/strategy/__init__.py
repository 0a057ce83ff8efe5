"""``microserve strategy``: sources written, checked and published, versions changed, what is in force
shown.

Owns names, flags, what is printed and exit codes (0 done, 1 failed, 2 a flag or a setting is wrong). A
source is run by check_process.py alone, in a process of its own (task.py: what it is asked); what is said
to the index is ../shared/control_client.py's. Must not know how routers judge versions. Start at group.py
(every command), then new.py, check.py, publish.py, change.py (what is in force), view/ (what is shown).
"""
