"""Attention over paged KV, as functions of tensors.

Owns the CPU's way (paged_attention.py), the GPU's (gpu_attention.py picks, triton_attention.py computes) and
what FlashInfer is told of a step (attention_plan.py). Must not know sequences, blocks' owners or a model:
block tables and lengths come in as tensors. ../reference.py is what each is held against. Start at
paged_attention.py.
"""
