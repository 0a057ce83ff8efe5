"""What a strategy's code may do to the router that runs it: how long, and with how much memory.

Owns the watch over every run of such code (overseer.py), where it may be broken off without halving anything
of the router's (cut.py), and whose code runs, with the tasks that it has started (author.py). Must not know
requests, versions in force, or what follows from a hang (authoring/driver.py and rollout/ do). Start at
overseer.py.
"""
