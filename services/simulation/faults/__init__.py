"""Meshes full of faults, by seed, and what must be true of them: every promise as a check that can fail.

Owns what a seed means, how faults happen, and the verdict. Must not change a service to make it fail:
faults are of messages, memory, clocks and processes. A planted bug
(tests/simulation/mutation/mutations.py) must be found here.

Start with ``scenario.py`` (what a seed draws; ``fates.py`` its faults, where a new kind goes), then
``campaign.py`` (one seed from start to verdict) and ``judge.py`` (the promises). ``fault.py`` switches faults
on and off, ``ambush.py`` waits for a moment; they happen in ``../network.py``, ``../heap.py`` and
``../loop.py``. ``strategies.py`` provokes rare situations and ``meeting.py`` counts them.
"""
