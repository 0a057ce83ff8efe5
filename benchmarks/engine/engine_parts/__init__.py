"""Parts of the engine's benchmarks: what is timed, what it is compared with, and figures of many.

Owns the memory's speed (``memory.py``), the project's two ways to compute a step and the steps themselves
(``steps.py``), a real mesh and its client (``serving.py``), peers (``peers.py`` starts the processes that
``peer_openvino.py`` and ``peer_transformers.py`` are, and that know nothing of this project), an engine
without a mesh (``bare_engine.py``, a process) and medians (``spread.py``). Must not know what is asked or
printed: that is in the files one folder up. Start with ``steps.py``.
"""
