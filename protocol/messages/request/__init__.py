"""What travels with one request from gateway to router to engine.

Owns how its tokens are chosen (sampling.py), what is known of it beside its prompt (attributes.py), what
bounds in an action mean (interval.py), and the log-probabilities of its prompt, on their way back
(prompt_logprobs.py). Must not know the conversations that carry them. Start at sampling.py.
"""
