"""What an engine and its kernels reach on a GPU, against ceilings measured in the same run.

Owns whole engines (``gpu.py``, with ``gpu_parts/``), what exact bits cost them (``gpu_exact.py``), and the
kernels alone (``gpu_kernels.py``). Where there is no GPU they say so and measure nothing;
``deploy/gpu_check.sh`` runs all. Must not know the other rooms: a script finds only what lies beside it.
Start with ``gpu.py``.
"""
