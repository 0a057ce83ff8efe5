"""Strategies against load: a trace served in the time that real hardware would take, and nothing computed.

Owns traces, how long a step and a put take, and what clients would have seen. Must not judge tokens (they
are drawn from nothing here); a wrong one is found in ``faults/``.

Start with ``task.py`` (what ``microserve simulate`` asks), then ``planner.py`` (a task's points) and
``point.py`` (one strategy under one load). ``engine.py`` is an engine that takes the time of its profile, and
``work.py`` counts what it does; ``timing.py`` has the profiles, ``trace.py`` the requests, ``trouble.py``
what goes wrong, ``progress.py`` the bounds of a run, ``measure.py`` and ``figures/`` what came out.
"""
