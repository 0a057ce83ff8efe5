"""``microserve profile``: what ways of making KV small bring, cost and lose, for a model and its prompts.

Owns the flags (command.py), a run from prompts to a library (run.py), what is searched (space.py), the
prompts and what each is for (workload.py), and the record that a broken-off run goes on from (journal.py).
measure/ measures one profile, search/ says which one next. Must not know links or requests: who chooses by
the library is kvcache/codec/choice/. Start at run.py.
"""
