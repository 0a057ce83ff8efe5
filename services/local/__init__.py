"""A whole mesh on this machine: ``microserve up``, ``down`` and ``ps``.

Owns processes, the directory in which they leave their state and logs, and the screen. Must not know what a
service does: a child is a command, a log file and a place in the order of stopping.

Start with up.py (the order of events), then composition.py (which children, with which settings), then
supervisor.py (start, wait for ready, restart, stop), notice.py (who says that it is ready). directory.py is
what others read of it, view.py what is seen; event_log.py reads logs; demo/ makes the
model and asks the one question; leash.py ends orphans. gateway_workers.py is a gateway of several
processes where no ``up`` is above it.
"""
