"""Which candidates are worth measuring: a search that asks for one and is told what it came to.

Owns candidates as numbers (candidate.py), what a set of points is worth (front.py), the paper's Bayesian
engine (bayes.py, on the surrogate of surrogate.py), and what it is held against: all of them, and some by lot
(baseline.py). No clock, no files, no model: must not know what a candidate is nor how it is measured.
scikit-learn is imported when a surrogate is fitted. Start at bayes.py.
"""
