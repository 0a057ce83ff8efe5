"""The front of an engine that is vLLM's: what routers ask, as requests to vLLM; what vLLM says, as answers.

Owns the state (state.py: records, requests that are at vLLM, their ends), the actions (actions.py), receives
and their grants over the same table as our own engine's (receives.py, arrivals.py; early.py: when vLLM begins
before all is in; pool.py: what *free* means here), our parameters in vLLM's words (sampling.py) and its
outputs in ours (output.py), its rates (rates.py), the core that the shell asks (core.py), and the only file
that calls vLLM (asyncllm.py). Must not know routers nor what vLLM's processes do with a request
(../connector). Start at core.py, then actions.py.
"""
