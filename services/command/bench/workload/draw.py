"""What goes by lot: how long prompts and answers are, and when requests come. Pure; a seed decides."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator

from microserve.services.command.bench.task import BURSTS, CONSTANT, FIXED, SHAREGPT, UNIFORM, Load

SHORTEST, LONGEST = 4, 2048
"""Of ``sharegpt``, in tokens."""
SHAREGPT_INPUT = (80.0, 1.4)
SHAREGPT_OUTPUT = (120.0, 1.0)
"""Median tokens and sigma of log-normal lengths like those of people's chats: many short ones, some long
ones, means of about 190 each between the bounds. Parameters of our own; no data set is read."""


def lengths(load: Load) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and answer, request after request, at least 1 each; without end."""
    chance = random.Random(f"lengths {load.seed}")
    means = (load.input_len, load.output_len)
    while True:
        if load.lengths == FIXED:
            yield means
        elif load.lengths == UNIFORM:
            prompt, output = (
                chance.randint(math.floor(mean * (1 - load.spread)), math.ceil(mean * (1 + load.spread)))
                for mean in means
            )
            yield max(1, prompt), max(1, output)
        elif load.lengths == SHAREGPT:
            prompt, output = (
                min(LONGEST, max(SHORTEST, round(median * math.exp(chance.gauss(0.0, sigma)))))
                for median, sigma in (SHAREGPT_INPUT, SHAREGPT_OUTPUT)
            )
            yield prompt, output
        else:
            prompt, output = (
                max(1, round(mean * math.exp(chance.gauss(-(load.spread**2) / 2, load.spread))))
                for mean in means
            )
            yield prompt, output


def arrivals(load: Load) -> Iterator[float]:
    """Seconds from the beginning, ``rate`` a second on average; without end. Needs a rate."""
    if load.arrival == CONSTANT:
        number = 0
        while True:
            yield number / load.rate
            number += 1
    chance = random.Random(f"arrivals {load.seed}")
    shape = load.burstiness if load.arrival == BURSTS else 1.0
    at_s = 0.0
    while True:
        at_s += chance.gammavariate(shape, 1.0 / (load.rate * shape))
        yield at_s
