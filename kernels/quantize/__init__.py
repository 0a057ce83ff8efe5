"""KV in 8 bits and back: int8 and fp8, by Triton and by plain tensors.

Owns the two formats and their error. Nothing calls them yet: they are kept for codecs of transfers. Must not
know a transfer or a layout of blocks. Start at kv_quantize.py.
"""
