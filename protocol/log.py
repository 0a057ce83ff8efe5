"""Event names and the one way to log: structlog, a JSON object a line.

Names are an interface (``noun.past``): ``microserve tail`` and operators' own tools match on them, and
renaming one is a changelog entry. Values are key-values, never formatted text; no prompt text, no per-token
events. ``ts`` is wall-clock seconds for people; durations are measured by the monotonic clock.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any, TextIO

import structlog

SERVICE_STARTED = "service.started"
SERVICE_READY = "service.ready"
SERVICE_STOPPED = "service.stopped"
SERVICE_FAILED = "service.failed"
CHILD_STARTED = "child.started"
CHILD_EXITED = "child.exited"
CHILD_FAILED = "child.failed"
CHILD_STUCK = "child.stuck"
"""A child could not be started, or ends too often: it is left down, and the others serve on."""
STATE_UNWRITTEN = "state.unwritten"
"""``up`` cannot write its state directory: what ``ps`` shows is out of date, and says so."""
ENGINE_JOINED = "engine.joined"
ENGINE_LOST = "engine.lost"
ENGINE_LEFT = "engine.left"
ENGINE_DRAINING = "engine.draining"
"""It takes no new work; what runs there moves to other engines, and then it leaves."""
ENGINE_REFUSED = "engine.refused"
ENGINE_LABELLED = "engine.labelled"
"""An operator gave it other labels: in the index, with who (audit); in a router, from when on they count."""
ROUTER_JOINED = "router.joined"
ROUTER_LOST = "router.lost"
GATEWAY_JOINED = "gateway.joined"
GATEWAY_LOST = "gateway.lost"
INDEX_JOINED = "index.joined"
INDEX_LOST = "index.lost"
INDEX_RESYNCED = "index.resynced"
INDEX_RESYNC_FAILED = "index.resync_failed"
WORLD_AWAITED = "world.awaited"
"""An engine waits for other ranks of its NVSHMEM world: which are there."""
WORLD_FORMED = "world.formed"
"""The index has told all ranks of a world of each other."""
WORLD_JOINED = "world.joined"
WORLD_REFUSED = "world.refused"
"""An engine may not wait for that world as that rank."""
RANK_LOST = "rank.lost"
"""A rank of our world is proven dead: the lanes that it held are free."""
REQUEST_ACCEPTED = "request.accepted"
REQUEST_FINISHED = "request.finished"
"""The canonical line: one per request and service that saw it; the gateway's has the phases."""
REQUEST_CONTINUED = "request.continued"
"""An engine failed or left under it; it goes on elsewhere."""
REQUEST_MOVED = "request.moved"
"""The KV of a running request went from a leaving engine to another one."""
REQUEST_ABORTED = "request.aborted"
REQUEST_PREEMPTED = "request.preempted"
GRANT_OPENED = "grant.opened"
GRANT_EXPIRED = "grant.expired"
GRANT_QUARANTINED = "grant.quarantined"
GRANT_DISCHARGED = "grant.discharged"
KV_SENT = "kv.sent"
KV_SEND_FAILED = "kv.send_failed"
KV_RECEIVED = "kv.received"
KV_COMMITTED = "kv.committed"
STEP_FAILED = "step.failed"
ATTENTION_CHOSEN = "attention.chosen"
"""An engine on a GPU says at its start what its attention runs on, and why not on FlashInfer."""
KERNEL_MISSING = "kernel.missing"
"""A kernel cannot be had on this machine, and what runs instead of it; at an engine's start."""
FRAME_REJECTED = "frame.rejected"
BUS_HANDLER_FAILED = "bus.handler_failed"
STRATEGY_FAILED = "strategy.failed"
STRATEGY_SLOW = "strategy.slow"
"""A strategy's code held the router for longer than ``router.strategy_budget_s``; once a request."""
STRATEGY_LOADED = "strategy.loaded"
STRATEGY_PUBLISHED = "strategy.published"
"""The index logged a change (audit: who, what, digest, version); a rollback is an event of its own."""
STRATEGY_ROLLED_BACK = "strategy.rolled_back"
STRATEGY_REFUSED = "strategy.refused"
"""Somebody asked for a change that is against the rules, or had no right to (audit)."""
STRATEGY_APPLIED = "strategy.applied"
"""A router took a control state over; requests in flight finish on what they began with."""
STRATEGY_REJECTED = "strategy.rejected"
"""A router cannot run a version, or has seen it fail too often; it told the index."""
SHADOW_FAILED = "shadow.failed"
"""A shadow's decision about one request was a mistake; nobody was served by it."""
CONTROL_OPENED = "control.opened"
"""The index has read its control log."""
PLAN_FAILED = "plan.failed"
"""A strategy's background task raised; it begins again after a pause."""
KEYS_READ = "keys.read"
"""A gateway has taken a changed keys' file over."""
KEYS_REJECTED = "keys.rejected"
"""It cannot be read or is wrong; the keys before it stay in force."""
USAGE_UNWRITTEN = "usage.unwritten"
"""What keys have used cannot be written down; it is kept and written later."""
CERTIFICATE_READ = "certificate.read"
CERTIFICATE_REJECTED = "certificate.rejected"
"""A new TLS certificate is wrong; the one before it is shown on."""
HELPER_ENDED = "helper.ended"
"""A gateway's process for templates and large bodies ended in the middle of a job; the next has a new one."""
HTTP_REJECTED = "http.rejected"
HTTP_FIELD_IGNORED = "http.field_ignored"
"""A client sent a field that nobody knows; once a name."""


def _stamp(_logger: Any, _method: str, event: dict[str, Any]) -> dict[str, Any]:
    event["ts"] = round(time.time(), 6)
    return event


def configure(service: str, service_id: str, *, level: str = "info", directory: str = "") -> TextIO | None:
    """Set up logging for this process and bind ``service`` and ``id`` to every line.

    JSON goes to ``directory/<service>-<id>.jsonl`` when a directory is given, else to stderr (coloured text
    when that is a terminal). Returns the open file, for the caller to close at its end.
    """
    number = logging.getLevelNamesMapping().get(level.upper(), logging.INFO)
    file: TextIO | None = None
    if directory:
        Path(directory).mkdir(parents=True, exist_ok=True)
        path = Path(directory) / f"{service}-{service_id}.jsonl"
        file = open(path, "a", buffering=1, encoding="utf-8")  # noqa: SIM115  (the caller closes it)
    shared: list[Any] = [structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, _stamp]
    if file is None and sys.stderr.isatty():
        render: list[Any] = [structlog.dev.ConsoleRenderer()]
    else:
        # Without locals: they could hold keys or prompt text.
        tracebacks = structlog.tracebacks.ExceptionDictTransformer(show_locals=False)
        render = [structlog.processors.ExceptionRenderer(tracebacks), structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=[*shared, *render],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.WriteLoggerFactory(file or sys.stderr),
        cache_logger_on_first_use=False,
    )
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(service=service, id=service_id)
    return file
