"""Forms of the view with few words."""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.gateway.view.forms import CheckForm, EngineForm, HealthForm, LoadForm, RequestForm

_REQUEST = RequestForm(
    id="",
    http_id="",
    at=1.0,
    age_s=0.0,
    path="/v1/completions",
    stream=False,
    status=200,
    code="",
    finish_reason="length",
    model="tiny",
    key="",
    strategy="auto",
    strategy_version=0,
    share="stable",
    engines=[],
    heaps=[],
    why="",
    alone="",
    moves=0,
    numerics="",
    exact=True,
    prompt_tokens=3,
    cached_tokens=0,
    received_tokens=0,
    output_tokens=5,
    ttft_s=0.1,
    wall_s=0.5,
    phases_s={},
)
_LOAD = LoadForm(
    running=0,
    waiting=0,
    grants=0,
    queued_prefill_tokens=0,
    used_blocks=0,
    cached_blocks=0,
    free_blocks=10,
    quarantined_blocks=0,
    prefill_tokens_per_s=0.0,
    decode_step_s=0.0,
    prefill_share=0.0,
    num_steps=0,
    draining=False,
)


def request_form(request_id: str, **fields: Any) -> RequestForm:
    return msgspec.structs.replace(_REQUEST, id=request_id, **fields)


def load_form(**fields: Any) -> LoadForm:
    return msgspec.structs.replace(_LOAD, **fields)


def engine_form(engine_id: str, *, state: str = "ready", **load: Any) -> EngineForm:
    return EngineForm(
        id=engine_id,
        state=state,
        detail="",
        address="tcp://127.0.0.1:1",
        host="127.0.0.1",
        model="tiny",
        backend="native",
        backend_version="",
        numerics="",
        exact=True,
        labels=[],
        heaps=["shm"],
        block_size=16,
        num_blocks=10,
        can=[],
        load=load_form(**load),
    )


def health_form(at: float = 0.0, **fields: Any) -> HealthForm:
    return msgspec.structs.replace(
        HealthForm(at=at, version="1", ready=True, draining=False, alarms=[], checks=[], limits={}), **fields
    )


def check_form(source: str, target: str, at: float = 0.0, **fields: Any) -> CheckForm:
    form = CheckForm(source, target, "equal", "", "bits", "", at, 0.4, 99, "router")
    return msgspec.structs.replace(form, **fields)
