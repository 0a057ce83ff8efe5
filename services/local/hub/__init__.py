"""A model by its name at the Hugging Face Hub: found in the cache, or fetched into it.

Owns what a name may be (name.py), which of a repository's files are needed (files.py), whether they fit here
(sizes.py), where they are kept (place.py), the talk with the Hub (client.py), several files of it at a time
(streams.py), and the order of it all (fetch.py). Must not know what serves the model: it gives a directory.
huggingface_hub is imported when something is to be fetched, by client.py alone. Start at resolve.py.
"""
