"""The connector that vLLM loads: our grants and sends inside its scheduler and worker, by public hooks only.

Owns the scheduler side's state (receives.py: parked requests and who waits for them; sends.py: which tokens a
step computes for whom), the worker side's (putting.py: layers into peers' heaps; loading.py: what is
reported, and the wait for layers that vLLM begins with early; placement.py: vLLM's KV cache as the data of
our heap), what goes from one to the other (orders.py, scheduler_side.py, worker_side.py), what is refused at
the start (limits.py), and that vLLM's processes end with the front (lifeline.py). connector.py is the door
that vLLM calls, and the only file that imports it. Must not know sockets, nor the front's table of grants.
Start at connector.py.
"""
