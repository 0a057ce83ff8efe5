"""Client ends that several services use: a connection to one engine, what the index says, KV events.

Owns what a router, the index and an operator's command need of a peer: calls, token streams, repeated aborts
and liveness of an engine (engine.py, stream.py, abort.py), the list of members and the control state as the
index tells them (index_watch.py), an engine's KV events as a gapless feed (feed.py, feed_state.py). Must not
know who asks: no strategies, no requests' scopes, no index state. Start at engine.py.
"""
