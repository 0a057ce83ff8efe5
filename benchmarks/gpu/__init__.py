"""What an engine and its kernels reach on a GPU, against ceilings measured in the same run.

Owns whole engines (``gpu.py``, with ``gpu_parts/``) and the kernels alone (``gpu_kernels.py``). Where there
is no GPU both say so and measure nothing; ``deploy/gpu_check.sh`` runs both. Must not know the other rooms: a
script finds only what lies beside it. Start with ``gpu.py``.
"""
