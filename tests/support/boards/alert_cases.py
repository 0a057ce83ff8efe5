"""For each alert what makes it fire, what the operator then reads, and what must not. As promtool has it: a
value a minute, ``0+6x30`` is thirty steps of 6 from 0."""

from __future__ import annotations

from dataclasses import dataclass, field

JOB = 'job="microserve"'
ENGINE = f'{JOB}, model_name="tiny", engine="e1"'
E1 = {"model_name": "tiny", "engine": "e1"}
INDEX_UP = {f'up{{{JOB}, service="index", id="index"}}': "1x30"}
STILL, STEADY = "7x30", "0+60x30"


@dataclass(frozen=True)
class AlertCase:
    alert: str
    series: dict[str, str]
    summary: str
    labels: dict[str, str] = field(default_factory=dict)
    """Beside ``job``."""
    quiet: tuple[dict[str, str], ...] = ()
    """What it has nothing to say of: instead of series of the same name, or beside others."""


def _answers(failed: str) -> dict[str, str]:
    answers = f'microserve_http_responses_total{{{JOB}, status="'
    return {f'{answers}200", code=""}}': "0+60x30", f'{answers}503", code="no_engines"}}': failed}


def _ends(failed: str) -> dict[str, str]:
    ends = f'microserve_strategy_requests_total{{{JOB}, strategy="auto", result="'
    clients = dict.fromkeys(
        (f'{ends}{code}"}}' for code in ("invalid_request", "model_not_found")), "0+60x30"
    )
    return {f'{ends}stop"}}': "0+60x30", **clients, f'{ends}engine_lost"}}': failed}


def _lag(late: str) -> dict[str, str]:
    lag = f'microserve_loop_lag_seconds_bucket{{{JOB}, service="router", id="router", le="'
    return {f'{lag}0.25"}}': "0+30x30", f'{lag}0.5"}}': late, f'{lag}+Inf"}}': late}


REQUESTS = (
    f'microserve_router_strategy_requests_total{{{JOB}, router="router", strategy="auto", result="stop"}}'
)
SERVES = {f'microserve_requests_running{{{JOB}, model_name="tiny"}}': "0x30"}
MEMBERS = f'microserve_index_members{{{JOB}, model_name="tiny"}}'
RUNNING, WAITING = (f"microserve_engine_requests_{each}{{{ENGINE}}}" for each in ("running", "waiting"))
STEPS = f'microserve_engine_step_seconds_count{{{ENGINE}, kind="decode"}}'
TOKENS = {f"microserve_engine_{each}_tokens_total{{{ENGINE}}}": STILL for each in ("prompt", "generation")}
SENDS = f'microserve_engine_send_seconds_count{{{ENGINE}, heap="shm"}}'
SENDS_FAILED = f'microserve_engine_sends_failed_total{{{ENGINE}, code="transfer_failed"}}'
MISSING = f"microserve_index_missing{{{JOB}, code="
FED = f'microserve_router_index_live{{{JOB}, router="router", engine="e1"}}'

CASES = (
    AlertCase(
        "MicroserveNoEngine",
        {**SERVES, **INDEX_UP, f'microserve_index_members{{{JOB}, model_name=""}}': "0x30"},
        "No engine serves tiny in microserve: microserve doctor",
        {"model_name": "tiny"},
        quiet=({**SERVES, **INDEX_UP, MEMBERS: "1x30"}, SERVES),
    ),
    AlertCase(
        "MicroserveNoRouter",
        {f'microserve_routers_alive{{{JOB}, id="gateway"}}': "0x30"},
        "Gateway gateway of microserve reaches no router: microserve doctor",
        {"id": "gateway"},
        quiet=({f'microserve_routers_alive{{{JOB}, id="gateway"}}': "1x30"},),
    ),
    AlertCase(
        "MicroserveErrors",
        _answers("0+6x30"),
        "More than 5 % of the answers of microserve are errors: microserve tail --filter status=5xx",
        quiet=(_answers("0+1x30"), _answers("_x30"), _answers("0+0x30")),
    ),
    AlertCase(
        "MicroserveIndexUnreachable",
        {f'up{{{JOB}, service="index", id="index"}}': "0x30"},
        "The index of microserve does not answer: microserve ps",
        {"service": "index", "id": "index"},
        quiet=(INDEX_UP, {f'up{{{JOB}, service="router", id="router"}}': "0x30"}),
    ),
    AlertCase(
        "MicroserveSelfCheckDiffers",
        {f"microserve_index_suspects{{{JOB}}}": "2x30"},
        "2 pairs of engines of microserve do not agree: microserve top",
        quiet=({f"microserve_index_suspects{{{JOB}}}": "0x30"},),
    ),
    AlertCase(
        "MicroserveEngineStalled",
        {RUNNING: "2x30", WAITING: "0x30", STEPS: STILL, **TOKENS},
        "Engine e1 of microserve has work and computes nothing: microserve doctor",
        E1,
        quiet=(
            {RUNNING: "2x30", WAITING: "0x30", STEPS: STEADY, **TOKENS},
            {RUNNING: "0x30", WAITING: "0x30", STEPS: STILL, **TOKENS},
            {RUNNING: "2x30", WAITING: "0x30", STEPS: STILL, **dict.fromkeys(TOKENS, STEADY)},
        ),
    ),
    AlertCase(
        "MicroserveEngineGone",
        {f'{MISSING}"engine_lost"}}': "1x30"},
        "1 engines of microserve are lost and not back: microserve doctor",
        quiet=({f'{MISSING}"engine_lost"}}': "0x30"}, {f'{MISSING}"config_error"}}': "1x30"}),
    ),
    AlertCase(
        "MicroserveEngineRefused",
        {f'{MISSING}"config_error"}}': "1x30"},
        "An engine of microserve is not let in (config_error): microserve doctor",
        {"code": "config_error"},
        quiet=({f'{MISSING}"engine_lost"}}': "1x30"},),
    ),
    AlertCase(
        "MicroserveEngineFailing",
        {f"microserve_engine_steps_failed_total{{{ENGINE}}}": "0+1x30"},
        "Steps of engine e1 of microserve fail: microserve tail",
        E1,
        quiet=({f"microserve_engine_steps_failed_total{{{ENGINE}}}": STILL},),
    ),
    AlertCase(
        "MicroserveUnread",
        {f'up{{{JOB}, service="gateway", id="gateway"}}': "0x30"},
        "Metrics of gateway gateway of microserve cannot be read: microserve ps",
        {"service": "gateway", "id": "gateway"},
        quiet=(
            {f'up{{{JOB}, service="gateway", id="gateway"}}': "1x30"},
            {f'up{{{JOB}, service="index", id="index"}}': "0x30"},
            {'up{job="somebody else\'s"}': "0x30"},
        ),
    ),
    AlertCase(
        "MicroserveAnswersBreak",
        _ends("0+6x30"),
        "More than 1 % of the answers of microserve end in an error: microserve tail",
        quiet=(_ends("0+0x30"), _ends("5x30")),
    ),
    AlertCase(
        "MicroserveFailovers",
        {
            f'microserve_router_failovers_total{{{JOB}, router="router", code="engine_lost"}}': "0+6x30",
            REQUESTS: "0+60x30",
        },
        "More than one request in twenty of microserve has to begin again elsewhere: microserve doctor",
        quiet=(
            {
                f'microserve_router_failovers_total{{{JOB}, router="router", code="engine_lost"}}': "0+1x30",
                REQUESTS: "0+60x30",
            },
            {REQUESTS: "0+60x30"},
        ),
    ),
    AlertCase(
        "MicroserveQueue",
        {f"microserve_engine_oldest_wait_seconds{{{ENGINE}}}": "45x30"},
        "Requests wait 45s at engine e1 of microserve: microserve top",
        E1,
        quiet=({f"microserve_engine_oldest_wait_seconds{{{ENGINE}}}": "29x30"},),
    ),
    AlertCase(
        "MicroserveKvFull",
        {f"microserve_engine_kv_cache_usage_ratio{{{ENGINE}}}": "0.97x30"},
        "KV of engine e1 of microserve is 97% in use: microserve top",
        E1,
        quiet=({f"microserve_engine_kv_cache_usage_ratio{{{ENGINE}}}": "0.9x30"},),
    ),
    AlertCase(
        "MicroserveTransfersFail",
        {SENDS_FAILED: "0+6x30", SENDS: "0+60x30"},
        "KV that engine e1 of microserve sends does not arrive: microserve doctor",
        {"engine": "e1"},
        quiet=({SENDS_FAILED: "0+1x30", SENDS: "0+60x30"}, {SENDS_FAILED: "0x30"}),
    ),
    AlertCase(
        "MicroserveTransfersFail",
        {SENDS_FAILED: "0+6x30"},  # no send has ever come to its end
        "KV that engine e1 of microserve sends does not arrive: microserve doctor",
        {"engine": "e1"},
    ),
    AlertCase(
        "MicroserveQuarantine",
        {f"microserve_engine_oldest_quarantine_seconds{{{ENGINE}}}": "0+60x30"},
        "Engine e1 of microserve holds blocks in quarantine: microserve doctor",
        E1,
        quiet=({f"microserve_engine_oldest_quarantine_seconds{{{ENGINE}}}": "90x30"},),
    ),
    AlertCase(
        "MicroserveLoopLag",
        _lag("0+60x30"),
        "router router of microserve is late by 495ms: microserve top",
        {"service": "router", "id": "router"},
        quiet=(_lag("0+30x30"),),
    ),
    AlertCase(
        "MicroservePrefixesUnknown",
        {FED: "0x30"},
        "Router router of microserve does not know what e1 has cached: microserve doctor",
        {"router": "router", "engine": "e1"},
        quiet=({FED: "1x30"}, {FED: "0 0 0 1x27"}),
    ),
    AlertCase(
        "MicroserveStrategyMistakes",
        {f'microserve_router_strategy_mistakes_total{{{JOB}, router="router", strategy="mine"}}': "0+1x30"},
        "Strategy mine of microserve makes mistakes: microserve strategy show mine",
        {"strategy": "mine"},
        quiet=({f'microserve_router_strategy_mistakes_total{{{JOB}, strategy="mine"}}': STILL},),
    ),
    AlertCase(
        "MicroserveRoutersBehind",
        {f"microserve_index_routers_behind{{{JOB}}}": "1x30"},
        "Routers of microserve have not applied the last change: microserve strategy list",
        quiet=({f"microserve_index_routers_behind{{{JOB}}}": "0 1 0x30"},),
    ),
    AlertCase(
        "MicroserveDropped",
        {f'microserve_bus_dropped_total{{{JOB}, service="router", id="router"}}': "0+1x30"},
        "router router of microserve drops messages: microserve top",
        {"service": "router", "id": "router"},
        quiet=({f'microserve_bus_dropped_total{{{JOB}, service="router", id="router"}}': STILL},),
    ),
)
