"""How sure a share is that was counted on so many prompts. Pure."""

from __future__ import annotations

import math

Z = 1.959964
"""Of 95 %."""


def wilson(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share of ``count`` trials. For a mean of numbers between 0 and 1 it is wide enough,
    too: none of that mean varies more than a coin. (0, 1) without trials."""
    if count == 0:
        return 0.0, 1.0
    scale = 1 + Z * Z / count
    middle = (share + Z * Z / (2 * count)) / scale
    half = Z * math.sqrt(share * (1 - share) / count + Z * Z / (4 * count * count)) / scale
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))


def relative(num_before: int, num_lost: int, num_gained: int, count: int) -> tuple[float, float, float]:
    """Right answers as a share of those before, with its 95 % interval: of ``count`` pairs, ``num_before``
    were right before, of which ``num_lost`` are not, and ``num_gained`` are that were not.

    Wilson's intervals of what was lost and gained, joined as distances of independent errors are, so that
    a row without any loss is not taken for a proof. ``num_before`` is at least 1."""
    lost, gained = num_lost / count, num_gained / count
    lost_low, lost_high = wilson(lost, count)
    gained_low, gained_high = wilson(gained, count)
    change = gained - lost
    low = change - math.hypot(lost_high - lost, gained - gained_low)
    high = change + math.hypot(lost - lost_low, gained_high - gained)
    share = num_before / count
    return 1 + change / share, max(0.0, 1 + low / share), 1 + high / share
