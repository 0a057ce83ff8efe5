"""The router: takes requests of gateways, lets a strategy serve each with the engines of the mesh.

    gateways ──> serving/ ──> strategies/ ──(authoring/)──> links/engine.py ──> engines

Rooms, from the bottom: engines/ (what is known of engines, no request), request/ (one request and what it
holds), authoring/ (the programming model, the one door of authors), strategies/ (those that are shipped),
rollout/ (published versions, canaries, shadows), check/ (do engines agree?), serving/ (admission, attempts
and where a strategy's exception ends, failover, the end). Loose: gateways.py (the ROUTER socket above),
service.py (all of it wired). Must not know the engine's or the index's code: engines are known by the wire
only. Start at service.py, then serving/serving.py.
"""
