"""``microserve explain``: why a request went where it went, and where another strategy would have sent it.

Owns how a router's record looks to people (table.py) and the question to the mesh (command.py); what another
strategy would decide is services/router/rollout/replay.py's. Must not know where records are kept, or how.
Start at command.py.
"""
