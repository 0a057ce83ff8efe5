"""How a request's end is told: the gateway's ``Ended`` and the router's canonical log line."""

from __future__ import annotations

import structlog

from microserve.protocol import log
from microserve.protocol.errors import MeshError
from microserve.protocol.messages.engine import Finished, Usage
from microserve.protocol.messages.router import Ended, Phases

_logger = structlog.get_logger()


def finished_well(
    finished: Finished, phases: Phases, strategy: str, version: int, engines: list[str]
) -> Ended:
    """The decode engine brought it to its end."""
    return Ended(
        finished.reason,
        finished.usage,
        phases,
        strategy,
        engines,
        stop_token_id=finished.stop_token_id,
        strategy_version=version,
    )


def cut_short(
    error: MeshError | None, usage: Usage, phases: Phases, strategy: str, version: int, engines: list[str]
) -> Ended:
    """It failed; without an error, its client is gone."""
    if error is None:
        return Ended("abort", usage, phases, strategy, engines, strategy_version=version)
    return Ended(
        "error",
        usage,
        phases,
        strategy,
        engines,
        code=error.code,
        detail=error.detail,
        field=error.field,
        retry_after_s=error.retry_after_s,
        strategy_version=version,
    )


def write_line(request_id: str, ended: Ended) -> None:
    """One line a request: numbers and names, no text and no tokens."""
    usage, phases = ended.usage, ended.phases
    _logger.info(
        log.REQUEST_FINISHED,
        request_id=request_id,
        strategy=ended.strategy,
        strategy_version=ended.strategy_version,
        engines=ended.engines,
        reason=ended.reason,
        code=ended.code,
        prompt_tokens=usage.prompt_tokens,
        cached_tokens=usage.cached_tokens,
        received_tokens=usage.received_tokens,
        output_tokens=usage.output_tokens,
        **{name: round(getattr(phases, name), 6) for name in Phases.__struct_fields__},
    )
