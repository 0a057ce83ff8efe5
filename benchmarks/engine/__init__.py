"""What an engine costs: one file a question, each run as it is.

Owns a step beside the transformers path and the memory's bound (``engine_step.py``), the same beside a busy
process (``engine_neighbour.py``), variants of the native step beside each other (``engine_variants.py``), how
far int8 weights are from others (``int8_quality.py``), two engines in a mesh beside two bare ones
(``engine_mesh.py``), HTTP beside peers (``engine_http.py``, peers by ``../peers.sh``), a vLLM behind the
mesh beside itself (``vllm_mesh.py``), two of them beside vLLM's own way between two (``vllm_pair.py``),
strategies on two engines (``paper_figure.py``), and the constants of the simulator's CPU profile
(``step_time.py``). What they
share is in ``engine_parts/``. Must not know the other rooms: a script finds only what lies beside it. Start
with ``engine_step.py``.
"""
