"""What is typed: ``microserve NAME`` (main.py), its flags, what is printed and the exit code.

Owns the command line, and the two talks that only people have: of changes (shared/control_client.py, for
strategy/ and label.py) and of an engine's leaving (drain.py). Must not hold what a service needs: nothing
below imports this. Everything heavy is imported by the command that runs, so that ``--help`` is light.

Start with main.py (every command, or where it is), then serve/ (the services) and shared/flags.py (where
settings come from; what they are: protocol/settings/settings.py). model/ has models by name; strategy/
checks and publishes; chat/ and bench/ are clients of a server, by client/; top/ watches by it, too; tail/
and settings_text.py print.
"""
