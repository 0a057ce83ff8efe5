"""What ``/view`` says in some states of a mesh: planted, of the gateway's own types, the same every time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from microserve.gateway.view.feed import Delta, Snapshot
from microserve.gateway.view.forms import (
    AlarmForm,
    CheckForm,
    EngineForm,
    HealthForm,
    KeyForm,
    KeysForm,
    MeshForm,
    PairForm,
    RequestDetail,
    RequestForm,
    RequestsForm,
    SampleForm,
    StrategiesForm,
)
from microserve.gateway.view.requests import timeline
from tests.support.gateway.view_forms import check_form, engine_form, health_form, load_form, request_form

AT = 1_796_000_000.0
NUM_SAMPLES = 60
HOSTILE = '<img src=x onerror="document.title=1">'
"""A name that would do something if it ever became markup."""
PHASES = {
    "queued": 0.001,
    "tokenised": 0.002,
    "routed": 0.004,
    "granted": 0.01,
    "prefilled": 0.2,
    "transferred": 0.03,
    "admitted": 0.003,
    "first_token": 0.05,
    "decoded": 0.9,
}


@dataclass
class Scene:
    """All that a page can ask for."""

    engines: list[EngineForm] = field(default_factory=list)
    running: list[RequestForm] = field(default_factory=list)
    ended: list[RequestForm] = field(default_factory=list)
    """The oldest first."""
    alarms: list[AlarmForm] = field(default_factory=list)
    history: list[SampleForm] = field(default_factory=list)
    records: list[dict[str, Any]] = field(default_factory=list)
    control: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    keys: list[KeyForm] = field(default_factory=list)
    checks: list[CheckForm] = field(default_factory=list)
    index_alive: bool = True
    loses_feed: bool = False
    """It ends behind its snapshot, and is refused from then on."""

    @property
    def health(self) -> HealthForm:
        return health_form(
            AT,
            alarms=self.alarms,
            checks=self.checks,
            ready=self.index_alive,
            limits={"streams": 3, "max_streams": 512},
        )

    def snapshot(self) -> Snapshot:
        return Snapshot(
            AT,
            self.index_alive,
            7,
            self.engines,
            self.running,
            len(self.running),
            self.ended[-200:],
            self.health,
        )

    def delta(self, number: int) -> Delta:
        """Every one tells of a request that has just ended, if any ever do."""
        new = [
            msgspec.structs.replace(
                self.ended[-1], id=f"new-{number}", http_id=f"new-{number}", at=AT + number
            )
        ]
        return Delta(
            AT + number / 2, self.index_alive, 7, len(self.running), ended=new if self.running else [],
            running=self.running,
        )  # fmt: skip

    def answers(self) -> dict[str, msgspec.Struct]:
        pairs = [
            PairForm(one.id, other.id, *(("shm", 0.0) if one.host == other.host else ("tcp", 1.2e8)))
            for one in self.engines
            for other in self.engines
            if one is not other and one.load and other.load
        ]
        routers = [
            {"address": "tcp://127.0.0.1:7", "router_id": "r0", "alive": self.index_alive, "model": "tiny",
             "num_engines": len(self.engines), "num_requests": 3, "max_requests": 100, "num_own_requests": 3}
        ]  # fmt: skip
        control = {
            name: self.control.get(name, []) for name in ("entries", "routers", "ramps", "history", "scores")
        }
        return {
            "mesh": MeshForm(AT, self.index_alive, 0.1, routers, self.engines, pairs, 5.0, self.history),
            "requests": RequestsForm(AT, self.running, self.ended[::-1][:1000], len(self.ended)),
            "strategies": StrategiesForm(at=AT, version=7, durable=True, **control),
            "keys": KeysForm(AT, self.keys),
            "health": self.health,
        }

    def detail(self, wanted: str) -> RequestDetail | None:
        found = next((each for each in [*self.running, *self.ended] if each.id == wanted), None)
        if found is None:
            return None
        return RequestDetail(found, timeline(found) if found.at else [], self.records, [])


def engine(number: int, *, host: str = "10.0.0.1", **fields: Any) -> EngineForm:
    form = engine_form(
        f"e{number}",
        running=number % 7,
        waiting=number % 3,
        used_blocks=300 + number,
        cached_blocks=200,
        free_blocks=100,
        quarantined_blocks=4 if number == 1 else 0,
        prefill_share=(number % 10) / 10,
        decode_share=(9 - number % 10) / 20,
        transfer_share=0.05,
        idle_share=(9 - number % 10) / 20 + 0.05,
        grants=2,
        granted_blocks=60,
        oldest_lease_s=0.25,
        decode_step_s=0.012,
        prefill_tokens_per_s=1234.5,
    )
    more = {"labels": ["prefill"] if number % 2 else [], "numerics": "llama/bf16/1", "host": host}
    return msgspec.structs.replace(form, **{**more, **fields})


def sample(engine_id: str, top: int = 8) -> SampleForm:
    counts = [at % top for at in range(NUM_SAMPLES)]
    shares = [(at % 20) / 20 for at in range(NUM_SAMPLES)]
    return SampleForm(engine_id, counts, [each // 2 for each in counts], shares, [80.0] * NUM_SAMPLES, shares)


def ended(number: int, **fields: Any) -> RequestForm:
    phases = {name: seconds * (1 + number % 5) for name, seconds in PHASES.items()}
    more = dict(
        http_id=f"http-{number}",
        at=AT - 500 + number,
        engines=["e0", "e1"],
        heaps=["shm"],
        key="ops" if number % 2 else "shop",
        strategy="balanced",
        strategy_version=3,
        share="canary" if number % 4 == 0 else "stable",
        cached_tokens=64,
        prompt_tokens=512,
        received_tokens=128,
        output_tokens=100,
        phases_s=phases,
        wall_s=sum(phases.values()),
        ttft_s=0.3,
        why="",
    )
    return request_form(f"request-{number}", **{**more, **fields})


def record() -> dict[str, Any]:
    def pick(chosen: str) -> dict[str, Any]:
        scored = [{"name": "prefix", "scores": [0.5, 1.0], "weight": 2.0}]
        return {"at_s": 0.001, "label": "prefill", "by": "cost", "temperature": 0.0,
                "candidates": ["e0", "e1"],
                "costs": [0.21, 0.34], "uncached_tokens": [448, 512], "sequences": [3, 1], "chosen": chosen,
                "excluded": ["e2"], "numerics": "llama/bf16/1", "scored": scored}  # fmt: skip

    def attempt(number: int, engine_id: str) -> dict[str, Any]:
        seen = {
            "engine_id": "e0",
            "labels": ["prefill"],
            "load_age_s": 0.05,
            "own_tokens": 12,
            "own_sequences": 1,
        }
        return {"strategy": "balanced", "version": 3, "at_s": number * 0.4, "num_tokens": 512,
                "cached": {"e0": 64},
                "engines": [seen], "picks": [pick("e0"), pick("e1")], "num_picks": 3,
                "notes": [{"at_s": 0.002, "text": HOSTILE, "values": {"best": 0.5}}], "num_notes": 1,
                "sends": [{"source": "e0", "target": "e1", "begin": 64, "end": 192}], "engine_id": engine_id,
                "begin": 192, "awaits_first": True}  # fmt: skip

    return {"request_id": "request-1", "age_s": 3.0, "strategy": "balanced", "version": 3, "tenant": True,
            "attributes": ["tier"], "block_size": 16, "num_prompt_tokens": 512, "num_output_tokens": 100,
            "max_tokens": 100, "reason": "length", "code": "", "attempts": [attempt(0, ""), attempt(1, "e1")],
            "num_attempts": 2, "is_cut": False}  # fmt: skip


def control() -> dict[str, list[dict[str, Any]]]:
    times = {"num": 50, "log_sum": -60.0, "log_square_sum": 80.0, "buckets": {}}
    none = {"num": 0, "log_sum": 0.0, "log_square_sum": 0.0, "buckets": {}}
    stable = {"version": 3, "digest": "a" * 64, "parameters": {"split": 0.5}}
    canary = {"version": 6, "digest": "b" * 64, "parameters": {"split": 0.7}}
    ramp = {
        "shares": [0.1, 0.5, 1.0],
        "every_s": 60.0,
        "min_requests": 10,
        "until": "better",
        "paused": False,
    }
    score = {"strategy": "balanced", "version": 3, "share": "stable", "engine_id": "", "num_requests": 50,
             "failures": {"timeout": 1}, "num_mistakes": 0, "num_moves": 2, "prompt_tokens": 1000,
             "cached_tokens": 400, "received_tokens": 10, "output_tokens": 500, "ttft": times, "tpot": times,
             "jct": times, "seconds": 60.0, "side": None}  # fmt: skip
    shadow = {"strategy": "balanced", "version": 5, "num_decisions": 9, "num_errors": 0, "num_agreed": 7,
              "ttft_s": 0.2, "served_ttft_s": 0.3, "computed_tokens": 90.0, "served_computed_tokens": 120.0,
              "sent_tokens": 3.0, "served_sent_tokens": 0.0}  # fmt: skip
    change = {"version": 7, "at": AT - 100, "who": "local", "kind": "publish", "strategy": "balanced",
              "digest": "b" * 64, "parameters": {}, "share": 0.1, "reason": HOSTILE, "engine": "",
              "labels": [],
              "shadow": False, "ramp": ramp}  # fmt: skip
    return {
        "entries": [{"strategy": "balanced", "stable": stable, "canary": canary, "share": 0.1,
                     "shadow": canary, "shadow_share": 0.5, "ramp": ramp}],
        "routers": [{"router_id": "r0", "version": 7, "shadows": [shadow], "default_strategy": "auto",
                     "trials": [],
                     "faults": [{"strategy": "balanced", "version": 2, "reason": "it hung"}],
                     "serves": [{"strategy": "auto", "version": 0, "suspended": []},
                                {"strategy": "balanced", "version": 3, "suspended": [2]}]}],
        "ramps": [{"strategy": "balanced", "step": 1, "since_s": 12.0}],
        "history": [change, {**change, "version": 4, "kind": "label", "strategy": "", "engine": "e1",
                             "labels": ["prefill"]}],
        "scores": [score, {**score, "version": 6, "share": "canary", "ttft": none}],
    }  # fmt: skip


def key(name: str, **fields: Any) -> KeyForm:
    form = KeyForm(name, 120, 3, 51200, 6400, 12000, 2, 63200, 100_000, 8, False)
    return msgspec.structs.replace(form, **fields)


def busy(num_engines: int = 4, num_requests: int = 300) -> Scene:
    engines = [engine(number, host=f"10.0.0.{1 + number // 8}") for number in range(num_engines)]
    many = [ended(number) for number in range(num_requests)]
    failed = ended(num_requests, code="engine_lost", status=502, key=HOSTILE)
    return Scene(
        engines=engines,
        running=[ended(10_000 + number, at=0.0, age_s=1.5, finish_reason="") for number in range(3)],
        ended=[*many, failed],
        history=[sample(each.id) for each in engines],
        records=[record()],
        control=control(),
        keys=[key("ops", operator=True, tokens_per_day=0), key("shop"), key(HOSTILE)],
        checks=[check_form("e0", "e1", at=AT - 12.0), check_form("e1", "e0", at=AT - 72.0)],
    )


def engine_dead() -> Scene:
    scene = busy()
    dead = msgspec.structs.replace(
        scene.engines[2], state="lost", detail="it has said nothing for 12 s", load=None
    )
    refused = msgspec.structs.replace(
        scene.engines[3], state="refused", detail=f"another model: {HOSTILE}", load=None
    )
    scene.engines[2:] = [dead, refused]
    scene.alarms = [AlarmForm(f"engine.{each.state}", each.id, each.detail) for each in (dead, refused)]
    scene.checks.insert(0, check_form("e1", "e0", at=AT, outcome="differs", differs="transferred"))
    return scene


def overloaded() -> Scene:
    scene = busy()
    scene.engines = [
        engine(number, load=msgspec.structs.replace(
            load_form(), running=256, waiting=900, used_blocks=600, free_blocks=0, prefill_share=1.0
        ))
        for number in range(4)
    ]  # fmt: skip
    scene.running = [ended(10_000 + number, at=0.0, age_s=30.0, finish_reason="") for number in range(200)]
    return scene


def feed_lost() -> Scene:
    scene = busy()
    scene.loses_feed = True
    return scene


def empty() -> Scene:
    return Scene(
        index_alive=False, alarms=[AlarmForm("gateway.not_ready", "gateway", "no request can be served")]
    )


def many_engines() -> Scene:
    return busy(64, 10_000)


SCENES = {
    "empty": empty,
    "busy": busy,
    "engine dead": engine_dead,
    "overloaded": overloaded,
    "feed lost": feed_lost,
    "64 engines": many_engines,
}
