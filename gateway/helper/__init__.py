"""What may take long is done in a process of its own: chat templates, and bodies that are large.

Owns that process from both sides: its jobs, its budgets of time and memory, its end and its next life. A
template is a program of the model's, a body is whatever a client sends, and both would hold the loop (and,
in a thread, the GIL) while everybody's tokens wait; a process can be killed. Must not know HTTP or routers.

Start with ``helper.py`` (what the gateway asks), then ``jobs.py`` (questions and answers) and ``process.py``
(one child: started late, one job at a time, ended at its budget). ``main.py`` is the child, ``work.py`` what
it does.
"""
