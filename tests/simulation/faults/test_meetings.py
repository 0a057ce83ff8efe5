"""The dice are aimed: every rare situation comes in enough worlds for a bug in it to be seen."""

from __future__ import annotations

import functools
from collections import Counter

import pytest

from microserve.services.simulation.engine.witness import Meeting
from microserve.services.simulation.faults.campaign import run_seed
from microserve.services.simulation.faults.meeting import (
    AT_ITS_END,
    COUNTED,
    KEPT_ON,
    LOGGED,
    MIXED_UP,
    SITUATIONS,
)

NUM_WORLDS = 300
AT_LEAST = {
    Meeting.TWO_LANES.value: 85,
    Meeting.GAP.value: 80,
    Meeting.SEALED_HELD.value: 50,
    Meeting.QUARANTINED_HELD.value: 45,
    Meeting.LATE_WRITER.value: 45,
    Meeting.LATE_MEETS_NEXT.value: 20,
    Meeting.SLOT_AGAIN.value: 55,
    "an early start": 65,
    "an early start gave way": 4,
    "a sequence was preempted": 18,
    "a send was preempted": 1,
    "a send failed": 100,
    "a grant expired": 3,
    "a request was continued": 95,
    "a running request was moved": 2,
    "blocks came out of quarantine": 45,
    "a grant became prefix cache": 65,
    "a sequence was made of KV of two classes": 20,
    "KV of another class was to be cache": 8,
    AT_ITS_END: 2,
    KEPT_ON: 4,
    MIXED_UP: 3,
}
"""Worlds of ``NUM_WORLDS``; about half of what came when the dice were aimed."""


@functools.cache
def _met() -> Counter[str]:
    worlds: Counter[str] = Counter()
    for seed in range(NUM_WORLDS):
        worlds.update(run_seed(seed).met.keys())
    return worlds


def test_every_situation_has_its_number() -> None:
    assert set(SITUATIONS) == set(AT_LEAST)
    assert {*COUNTED.values(), *LOGGED.values()} < set(SITUATIONS)


@pytest.mark.heavy
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_situation_is_met(situation: str) -> None:
    assert _met()[situation] >= AT_LEAST[situation], f"{situation}: in {_met()[situation]} of {NUM_WORLDS}"
