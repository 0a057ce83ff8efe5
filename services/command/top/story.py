"""One request taken apart, or one engine, in lines: where the time went, and why it went there.

Sans-I/O. Lines are escaped here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from microserve.gateway.view.forms import (
    CheckForm,
    EngineForm,
    HealthForm,
    PhaseForm,
    RequestDetail,
    RequestForm,
)
from microserve.protocol.logging.printable import printable
from microserve.protocol.messages.strategy.decisions import Explained, Explanation
from microserve.services.command.shared.why import strategy_name, why_line
from microserve.services.command.top.column import NONE, kv_usage, state_of, tpot_s

BAR_CELLS = 30
MAPS = frozenset({"cached", "values"})
"""Fields of a record that are maps, not structures."""


def request_lines(detail: RequestDetail) -> list[str]:
    """The hop timeline, which sums to the wall time; then what the routers remember."""
    form, found = detail.request, []
    if form is not None:
        found += [*_request(form), "", *timeline_lines(form, detail.timeline), "", "why here"]
        found.append(f"  {why_line(form.why, alone=form.alone, moves=form.moves, share=form.share)}")
    else:
        found += ["this gateway does not remember it (any more); its routers do", "", "why here"]
    found += [f"  {line}" for line in record_lines(detail.records)]
    if detail.silent:
        found.append(f"  did not answer: {', '.join(detail.silent)}")
    return [printable(line) for line in found]


def _request(form: RequestForm) -> Iterator[str]:
    yield f"request   {form.id or form.http_id}   x-request-id {form.http_id or NONE}"
    yield f"state     {state_of(form)}   HTTP {form.status or NONE}   {form.path}{' stream' * form.stream}"
    yield f"model     {form.model or NONE}   key {form.key or NONE}"
    strategy = strategy_name(form.strategy, form.strategy_version, form.share)
    heaps = f" by {', '.join(form.heaps)}" if form.heaps else ""
    yield f"strategy  {strategy}   engines {'→'.join(form.engines) or NONE}{heaps}"
    yield (
        f"tokens    in {form.prompt_tokens}  cached {form.cached_tokens}  received {form.received_tokens}  "
        f"out {form.output_tokens}"
    )
    tpot = tpot_s(form)
    ttft = "no token yet" if form.ttft_s is None else f"TTFT {form.ttft_s * 1000:.1f} ms"
    yield f"time      {ttft}" + (f"  TPOT {tpot * 1000:.2f} ms" if tpot is not None else "")
    if form.numerics:
        yield f"class     {form.numerics}{'  exact' * form.exact}"


def timeline_lines(form: RequestForm, timeline: Sequence[PhaseForm]) -> list[str]:
    """A hop a line with its share of the whole as a bar that begins where it began."""
    if not timeline:
        return [f"it still runs, for {form.age_s:.1f} s now: its timeline comes with its end"]
    total_s = sum(phase.seconds for phase in timeline)
    lines = []
    for phase in timeline:
        begin = round(BAR_CELLS * phase.begin_s / total_s) if total_s else 0
        cells = round(BAR_CELLS * phase.seconds / total_s) if total_s else 0
        bar = " " * begin + ("█" * cells if cells else "▏" if phase.seconds else "")
        took = f"  {phase.name:<12}{phase.seconds * 1000:>10.1f} ms"
        lines.append(f"{took}  {bar:<{BAR_CELLS + 1}} {phase.where}".rstrip())
    lines.append(f"  {'= wall':<12}{total_s * 1000:>10.1f} ms")
    return lines


def record_lines(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """As ``microserve explain`` has it; a record of another version, which does not fit, as it is."""
    from microserve.services.command.explain.table import lines

    told: list[str] = []
    for record in records:
        try:
            found = msgspec.convert(_boxed(record), Explanation, from_attributes=True)
        except msgspec.ValidationError:
            told.append(msgspec.json.encode(record).decode())
            continue
        told += lines(Explained(0, str(record.get("router_id") or "its router"), [found], 0, 0), {})
    return [line for line in told if line]


class _Box:
    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.__dict__.update({name: _boxed(value, name) for name, value in fields.items()})


def _boxed(value: Any, name: str = "") -> Any:
    """Structures of the wire are arrays, which msgspec makes of attributes and not of maps."""
    if isinstance(value, Mapping) and name not in MAPS:
        return _Box(value)
    if isinstance(value, list):  # JSON has no infinite cost
        return [math.inf if each is None else _boxed(each) for each in value]
    return value


def engine_lines(engine: EngineForm) -> list[str]:
    load = engine.load
    lines = [
        f"engine    {engine.id}   {engine.state}{': ' + engine.detail if engine.detail else ''}",
        f"address   {engine.address}   host {engine.host or NONE}",
        f"model     {engine.model or NONE}",
        f"computes  {engine.backend or NONE} {engine.backend_version}",
        f"class     {engine.numerics or NONE}{'  exact' * engine.exact}",
        f"labels    {', '.join(engine.labels) or NONE}",
        *([f"cluster   {engine.cluster}"] if engine.cluster else []),
        f"heaps     {', '.join(engine.heaps) or NONE}   can {', '.join(engine.can) or NONE}",
        f"blocks    {engine.num_blocks} of {engine.block_size} tokens",
    ]
    if load is not None:
        lines += [
            f"batch     {load.running} running, {load.waiting} waiting, {load.grants} grants, "
            f"{load.queued_prefill_tokens} prompt tokens to compute",
            f"kv        {kv_usage(load):.0%}: {load.used_blocks} used, {load.cached_blocks} cached, "
            f"{load.free_blocks} free, {load.granted_blocks} granted, {load.quarantined_blocks} quarantined; "
            f"oldest lease {load.oldest_lease_s:.1f} s",
            f"time      prefill {load.prefill_share:.0%}, decode {load.decode_share:.0%}, waiting for KV "
            f"{load.transfer_share:.0%}, idle {load.idle_share:.0%}",
            f"speed     prefill {load.prefill_tokens_per_s:.0f} tokens/s, decode step "
            f"{load.decode_step_s * 1000:.1f} ms, {load.num_steps} steps",
        ]
    return [printable(line) for line in lines]


def alarm_lines(health: HealthForm | None) -> list[str]:
    alarms = health.alarms if health is not None else []
    return [printable(f"  {alarm.name:<18} {alarm.subject}: {alarm.text}") for alarm in alarms]


def health_lines(health: HealthForm | None) -> list[str]:
    """What is wrong first."""
    if health is None:
        return ["nothing is known yet"]
    state = "ready" if health.ready else "NOT READY"
    lines = [f"gateway   {health.version}   {state}{'  draining' * health.draining}"]
    lines += [f"limit     {name} {value}" for name, value in health.limits.items()]
    lines += ["", f"alarms    {len(health.alarms) or 'none'}", *alarm_lines(health)]
    if health.checks:
        lines += ["", "self-checks"]
        lines += [f"  {_check_line(check, health.at)}" for check in health.checks]
    return [printable(line) for line in lines]


def _check_line(check: CheckForm, at: float) -> str:
    pair = f"{check.source} → {check.target}" if check.target else check.source
    why = check.differs or check.code
    return (
        f"{pair:<18} {check.outcome}{f' ({why})' * bool(why)}  {check.compared}  "
        f"{max(0.0, at - check.at):.0f} s ago, took {check.took_s * 1000:.0f} ms, {check.tokens} tokens, "
        f"by {check.router}"
    )
