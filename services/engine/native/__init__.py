"""A model on the native CPU step, without torch once it has been packed.

Owns which kernels serve (kernels.py), what is packed of a transformers model (packing.py, the one file here
that needs torch), the packed model (packed_model.py), its file (packed_file.py) and where such files are kept
(packed_cache.py), and steps by it (runner.py). Must not know requests, grants or the scheduler. Start at
runner.py.
"""
