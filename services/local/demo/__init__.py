"""The model that comes with a first start, and the question that it is asked.

Owns the download, the conversion in a process of its own, the directory in the cache, and one streamed
request. Must not know the mesh: it is given a URL. Start at model.py.
"""
