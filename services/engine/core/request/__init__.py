"""What an engine holds for requests, as plain state: under the core's lock, without a step of its own.

Owns one request's life (sequence.py: its tokens, its blocks, how far its KV goes), grants that were given,
each with who holds it (received.py), the state that a hybrid model keeps of it (state.py), and all that there
is under one request id (record.py). Must not know the scheduler, the actions, or what blocks mean
(../memory.py). Start at sequence.py.
"""
