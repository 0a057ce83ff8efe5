"""``microserve bench``: requests as they would come, sent to any OpenAI-compatible server, and how they
fared.

Owns what is sent and when (workload/), what each answer was (recorder.py), the figures of all (report.py)
and whether they may be believed (health.py). All of that is pure: load.py is the shell that sends,
worker.py a process of it, of which there may be several. Must know no server but by HTTP (../client/).
Start at command.py (the flags) and task.py (what they become).
"""
