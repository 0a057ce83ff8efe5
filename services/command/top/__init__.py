"""``microserve top``: a running mesh in a terminal, by a gateway's ``/view``.

Owns what is shown and how one moves in it. Two halves: sans-I/O (picture.py: what was heard; column.py: rows
and their order; story.py: one request or engine in words; place.py: where one is and what a word means;
plain.py: all of it once, without a terminal), and thin shells (link.py: HTTP, screen.py: the terminal).
Changes nothing in the mesh. Text from outside is escaped where it becomes a cell or a line.

Start with command.py, then picture.py.
"""
