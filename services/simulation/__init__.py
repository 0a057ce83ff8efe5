"""A whole mesh in one Python process, in virtual time: the same seed gives the same run, byte for byte.

Owns what stands in for clock, sockets, memory and model, exact enough to prove things about the real rest.
Of a gateway only HTTP and text stay outside. Nothing in the mesh may know of it; it knows every service.

    faults | load -> mesh -> engine | gateway -> bus | steps | heap -> network -> loop

Start with ``loop.py`` (time, and processes that freeze and die), then ``network.py`` and ``bus.py``
(messages), then ``mesh.py`` (who is there). ``engine.py`` and ``gateway.py`` are one process each,
``hash_runner.py`` the model (``marked_runner.py``: in meshes of several numerics classes), ``heap.py`` an
engine's memory (writes are lost, torn and late there) and ``witness.py`` what must be true of every write,
``steps.py`` its thread, ``journal.py`` what happened.

Three uses: ``faults/`` breaks a mesh and judges it, ``load/`` measures strategies, ``trial/`` tries one
before it serves.
"""
