"""State of fixed size that layers without KV keep of a request: short convolutions, gated delta nets.

Owns where its tensors lie in a request's state blocks (placing.py), and how transformers' own layers are
called on a packed batch, each sequence with its state (mixing.py). Must not know which blocks are whose,
nor transfers. Start at placing.py.
"""
