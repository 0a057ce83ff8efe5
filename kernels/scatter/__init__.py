"""KV written where it belongs: a step's rows into blocks, blocks into the blocks of another engine.

Owns the scatter of new rows (kv_scatter.py on a CPU, block_scatter.py by CUDA, triton_scatter.py by Triton),
the put of many ranges by one launch (block_put.py) or by one call (host_copy.py), and the counter that tells
of it (arrival_signal.py). Must not know grants or whether a write may still happen: kvcache/grant decides
that. Start at kv_scatter.py.
"""
