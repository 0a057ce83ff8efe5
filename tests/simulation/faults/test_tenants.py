"""Meshes of tenants under faults: whoever waits for a turn meanwhile, nothing is lost, doubled or kept."""

from __future__ import annotations

import zlib
from typing import Any

import pytest

from microserve.gateway.routers.client import RouterClient
from microserve.services.router.serving.turnstile import Turnstile
from microserve.services.simulation.faults.campaign import run_seed

SEEDS = (910_134, 910_135, 910_136, 910_137, 910_143, 910_236)
"""In all of them somebody waits."""
TENANTS = ["a", "a", "a", "b", ""]


def test_worlds_whose_requests_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    generate, enter = RouterClient.generate, Turnstile.enter

    def generate_for_a_tenant(self: RouterClient, *arguments: Any, **fields: Any) -> Any:
        number = zlib.crc32(fields["request_id"].encode())
        fields |= {"tenant": TENANTS[number % 5], "priority": number % 3 - 1}
        return generate(self, *arguments, **fields)

    def count(self: Turnstile, request_id: str, *arguments: Any) -> bool:
        is_due = enter(self, request_id, *arguments)
        if not is_due:
            waited.append(request_id)
        return is_due

    monkeypatch.setattr(RouterClient, "generate", generate_for_a_tenant)
    monkeypatch.setattr(Turnstile, "enter", count)
    broken = [(seed, found) for seed in SEEDS if (found := run_seed(seed).violations)]
    assert broken == []
    assert waited, "somebody had to wait"
