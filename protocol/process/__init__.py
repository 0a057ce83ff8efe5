"""A service as a process: how it starts, says that it is ready and well, stops, and with which exit code.

Owns log, loop, signals, watchdog and exit codes, the same for every service. Must not know which service it
runs.

Start with run.py (``run_service``, from settings to exit code), then lifecycle.py (what a service says of
itself), notify.py (what systemd is told of it), tick.py (when all do what they do every interval) and pace.py
(how long that is).
"""
