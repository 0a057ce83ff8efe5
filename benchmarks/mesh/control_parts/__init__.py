"""The parts of the benchmark of the control plane: what it drives, and what it drives it with.

Owns engines that answer at once (``instant_engine.py``, a process), a server to compare with (``bare.py``, a
process), the mesh around them and its CPU time (``mesh.py``), and the client (``client.py``). Must not know
what is measured or printed: that is ``control_plane.py``. Start there.
"""
