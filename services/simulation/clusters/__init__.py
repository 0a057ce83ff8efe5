"""Two clusters with queues: what the formula of services/clusters/ leaves out.

Owns events in virtual time: requests that come by lot, wait for an engine, for the link and for a place in a
batch. Knows no mesh: engines and link are a profile's figures, so that hours of two clusters take seconds.
Start at world.py, then policy.py (who goes across) and figures.py (what came of it).
"""
