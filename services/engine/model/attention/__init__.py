"""Attention of a step on paged KV.

Owns what a model's layers call (step.py: on a CPU, on a device, by exact kernels) and what FlashInfer's
wrapper is told of a step (flashinfer.py). Must not know how the kind is chosen (../attention_choice.py) nor
the model around it. Start at step.py.
"""
