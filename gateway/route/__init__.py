"""Handlers of paths that are no API's: each file those of one asker.

Owns what operators and tools ask (operator_routes.py), what is kept of responses (response_routes.py), the
view of a mesh and its page (view_routes.py, page_routes.py), and what other people's routers ask of a
worker (worker_routes.py). Must not know which path leads here, or who may: that is ../app.py's. Start at
operator_routes.py.
"""
