"""What a run sends and when: the same plan in each of its processes, which sends its share of it.

Owns requests in their order (plan.py): drawn by lot (draw.py) or written down (traces.py: Mooncake's,
Azure's, files of prompts), and prompts of given lengths that share what they should share (prompts.py).
Pure but for the files that are read. Must not know who sends, or what was answered. Start at plan.py.
"""
