"""One profile measured: bytes, seconds, and what it does to a model's answers.

Owns the model that goes on from any KV (replay.py), what its answers lose (quality.py; how sure that is:
interval.py), and payloads with their sizes and times (trip.py). Must not know which profile is measured next.
Start at quality.py.
"""
