"""An author's source becomes modules of Python, a file or a package of several, and is forgotten again.

Owns where sources are read from (files.py) and how modules are made of them (module.py); how several files
travel as one text is protocol/strategy_source.py's. Must not know what a strategy is. Start at module.py.
"""
