"""The shell of an engine: its sockets, around a core that has none, whatever computes in that core.

Owns start, heartbeats, drain and end (shell.py), the action socket (action_server.py), KV events for who
follows them (kv_publisher.py), the engine's place in the index (index_client.py), what is counted of it
(metrics.py), and what all these ask of a core (door.py). Must not know models, heaps, or how a core is
made. Start at door.py, then shell.py.
"""
