"""A gateway's ``/view`` that says what the test says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from microserve.gateway.view.feed import Feed, Look
from microserve.gateway.view.forms import (
    EngineForm,
    HealthForm,
    KeyForm,
    KeysForm,
    MeshForm,
    PhaseForm,
    RequestDetail,
    RequestForm,
    RequestsForm,
    StrategiesForm,
)
from tests.support.command.scripted_server import Asked
from tests.support.gateway.view_forms import engine_form, health_form, request_form

PHASES = {"queued": 0.01, "tokenised": 0.005, "routed": 0.005, "prefilled": 0.1, "decoded": 0.38}
KEY = KeyForm("team-a", 7, 1, 300, 100, 40, 1, 340, 1000, 4, False)
RECORD = {
    "request_id": "r1",
    "age_s": 2.0,
    "strategy": "auto",
    "version": 0,
    "tenant": False,
    "attributes": [],
    "block_size": 16,
    "num_prompt_tokens": 300,
    "num_output_tokens": 40,
    "max_tokens": 64,
    "reason": "length",
    "code": "",
    "attempts": [
        {
            "strategy": "auto",
            "version": 0,
            "at_s": 0.001,
            "num_tokens": 300,
            "cached": {"e0": 100, "e1": 0},
            "engines": [],
            "picks": [
                {
                    "at_s": 0.001,
                    "label": None,
                    "by": "cost",
                    "temperature": 0.0,
                    "candidates": ["e0", "e1"],
                    "costs": [200.0, 300.0],
                    "uncached_tokens": [200, 300],
                    "sequences": [1, 0],
                    "chosen": "e0",
                    "excluded": [],
                    "numerics": "",
                    "scored": [],
                }
            ],
            "num_picks": 1,
            "notes": [{"at_s": 0.001, "text": "near", "values": {"hops": 1}}],
            "num_notes": 1,
            "sends": [],
            "engine_id": "e0",
            "begin": 100,
            "awaits_first": False,
        }
    ],
    "num_attempts": 1,
    "is_cut": False,
}


def timeline() -> list[PhaseForm]:
    begin, parts = 0.0, []
    for name, seconds in PHASES.items():
        parts.append(PhaseForm(name, begin, seconds, "gateway" if name == "queued" else "e0"))
        begin += seconds
    return parts


@dataclass
class ViewServer:
    """Its ``answer`` is for ``scripted_server``."""

    engines: list[EngineForm] = field(
        default_factory=lambda: [
            engine_form("e0", running=3, waiting=1, used_blocks=6, cached_blocks=2, free_blocks=2),
            engine_form("e1", running=1, cached_blocks=5, free_blocks=5, prefill_share=0.5),
        ]
    )
    ended: Sequence[RequestForm] = field(
        default_factory=lambda: [
            request_form(
                "r1",
                engines=["e0"],
                why="any: e0 of 2 by cost",
                prompt_tokens=300,
                cached_tokens=100,
                output_tokens=40,
                phases_s=PHASES,
                age_s=2.0,
            ),
            request_form("r2", engines=["e1"], status=503, code="no_engines", age_s=1.0, wall_s=0.1),
        ]
    )
    running: Sequence[RequestForm] = field(
        default_factory=lambda: [request_form("r3", at=0.0, engines=["e0"], finish_reason="", age_s=4.0)]
    )
    health: HealthForm = field(default_factory=health_form)
    status: int = 200
    refusal: str = ""
    feeds: list[Asked] = field(default_factory=list)

    @property
    def look(self) -> Look:
        return Look(
            at=1.0,
            index_alive=True,
            control_version=1,
            engines=self.engines,
            running=self.running,
            num_running=len(self.running),
            num_ended=len(self.ended),
            health=self.health,
        )

    async def answer(self, asked: Asked) -> None:
        if self.status != 200:
            await asked.reply(self.status, {"error": {"message": self.refusal}})
            return
        path, _, _ = asked.path.removeprefix("/view/").partition("?")
        if path == "feed":
            self.feeds.append(asked)
            await asked.begin()
            feed = Feed("life")
            feed.look(self.look, [])
            await asked.raw(feed.snapshot(self.ended, feed.base))
            return
        await asked.reply(200, self._body(path))

    def _body(self, path: str) -> Any:
        forms = {
            "mesh": MeshForm(1.0, True, 0.1, [], self.engines, [], 5.0, []),
            "requests": RequestsForm(1.0, list(self.running), list(self.ended), len(self.ended)),
            "health": self.health,
            "keys": KeysForm(1.0, [KEY]),
            "strategies": StrategiesForm(
                1.0, 3, True, [{"strategy": "auto", "stable": None, "share": 0.0}], [], [], [], []
            ),
            "requests/r1": RequestDetail(self.ended[0] if self.ended else None, timeline(), [RECORD], []),
        }
        return json.loads(msgspec.json.encode(forms[path]))
