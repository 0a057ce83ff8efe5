"""How many bytes a second the links to others carry, by what transfers over them took.

A sample is of bytes on the wire and of the time in which some of them were under way: what a sender computed
or encoded in between is not the link's. Too few bytes measure a latency, and are no sample. The median of the
last few: one that stalled says nothing, and a link whose rate changes is known after three. Transfers at one
time share a link, and each measures its share, which is what the next one will get.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from statistics import median

MIN_SAMPLE_NBYTES = 64 << 10
NUM_SAMPLES = 5
MAX_LINKS = 256
"""The longest unused goes first."""


class LinkMonitor:
    """Of one sender; a link is named by its other end."""

    def __init__(self) -> None:
        self._samples: OrderedDict[str, deque[float]] = OrderedDict()

    def sent(self, link: str, nbytes: int, busy_s: float, *, was_bound: bool = True) -> None:
        """``nbytes`` went over ``link``, and for ``busy_s`` seconds some were under way. ``was_bound``: the
        link was what they waited for, not the receiver or the sender."""
        if not was_bound or nbytes < MIN_SAMPLE_NBYTES or not 0.0 < busy_s < math.inf:
            return
        samples = self._samples.setdefault(link, deque(maxlen=NUM_SAMPLES))
        samples.append(nbytes / busy_s)
        self._samples.move_to_end(link)
        if len(self._samples) > MAX_LINKS:
            self._samples.popitem(last=False)

    def goodput(self, link: str) -> float:
        """Bytes a second; 0: not measured."""
        return median(self._samples[link]) if link in self._samples else 0.0

    def forget(self, link: str) -> None:
        """Its other end is gone, or another process."""
        self._samples.pop(link, None)

    def goodputs(self, limit: int) -> dict[str, float]:
        """Of the ``limit`` links that were measured last."""
        newest = list(reversed(self._samples))[:limit]
        return {link: self.goodput(link) for link in newest}

    def check_integrity(self) -> None:
        """Raises AssertionError."""
        assert len(self._samples) <= MAX_LINKS
        for link, samples in self._samples.items():
            assert 0 < len(samples) <= NUM_SAMPLES and all(0 < each < math.inf for each in samples), link
