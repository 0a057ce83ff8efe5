"""Client ends that several services use: a connection to one engine, what the index says, KV events.

Owns what a router, the index and an operator's command need of a peer: an engine's calls, token streams and
end (engine.py, which judges by protocol/bus/peers.py that it is dead, and sends and repeats Abort; stream.py;
abort.py, the list of those not confirmed), a reader's one-off connection (snapshot.py), members and control
states as the index tells them (index_watch.py), and an engine's KV events as a gapless feed (feed.py,
feed_state.py; follow.py, follow_state.py for engines without snapshots). Must not know who asks: no
strategies, no requests' scopes, no index state. Start at
engine.py.
"""
