"""From a batch to tokens: the model, its attention on paged KV, the samplers.

Owns the transformers model whose attention reads and writes the pool (model.py, attention/), one packed
call a step (runner.py), the choice of kernels (attention_choice.py), sampling by counters on a CPU
(sampler.py), what a directory says before a weight is read (directory/), what a device needs besides
(device/), and the name of what it computes in (revision.py, numerics.py). Must not know requests, grants or
the scheduler: it takes batches. Start at runner.py.
"""
