"""Models by name: ``microserve model``, and what ``--model`` may be for every command that has it.

Owns the commands (command.py), and the flag, with how a fetch is shown and fails (flags.py). Must not know
how a model is found or fetched (services/local/hub/). Start at flags.py.
"""
