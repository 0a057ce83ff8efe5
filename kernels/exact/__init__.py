"""What a step on a GPU is made of where a row's bits may not depend on its company.

Owns products, norms, activations and attention in Triton, each with one tile for all sizes and one order of
sums; how they are launched, so that Triton makes one kernel of each; and the digest of all that decides
bits. Must not know models (services/engine/model/device/exact.py puts these in place of a module's parts),
sequences or blocks' owners. Start at launch.py, which has the rules; then triton_product.py, triton_rows.py
(norms, activations) and triton_segments.py (attention).
"""
