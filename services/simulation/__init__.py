"""A whole mesh in one Python process, in virtual time: the same seed gives the same run, byte for byte.

Owns what stands in for clock, sockets, memory and model, exact enough to prove things about the real rest.
Of a gateway only HTTP and text stay outside. Nothing in the mesh may know of it; it knows every service.

    faults | load -> mesh -> gateway -> engine -> bus -> network -> loop

Start with ``loop.py`` (time, and processes that freeze and die), then ``network.py`` and ``bus.py``
(messages), then ``mesh.py`` (who is there). ``engine/`` and ``gateway.py`` are one process each,
``journal.py`` is what happened.

Three uses: ``faults/`` breaks a mesh and judges it, ``load/`` measures strategies, ``trial/`` tries one
before it serves. ``clusters/`` stands apart: queues without a mesh, for plans of hours.
"""
