"""What came out of simulated runs: as figures, as lines for people and for programs, as pictures.

Owns how results look and how those of several seeds become one. Must not know a mesh, a strategy or how a run
is made: what is counted as what is ../measure.py's.

Start with ``result.py`` (the figures), then ``table.py`` (what is printed) and ``rows.py`` (a line a
request); ``plots.py`` draws and needs matplotlib.
"""
