"""The way out of spans, one for a process, as for its log: nothing, or OpenTelemetry's SDK.

Owns whether spans are made at all (:func:`is_on`): where the environment names an endpoint and the extra
``otel`` is installed. The SDK is imported then and only then; its own thread sends. A collector that is slow
or away costs spans and nothing else.

Services say what has ended and how spans are made of it; a thread makes them, many in a row. One by one,
between two messages, they cost a service several times as much, for nothing of it is in a cache then.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol

import structlog

from microserve.protocol import log
from microserve.protocol.tracing.span import Make

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
EXTRA = "otel"

_logger = structlog.get_logger()


class Output(Protocol):
    def tell(self, make: Make, given: tuple[Any, ...]) -> None:
        """Takes no time to speak of, and never raises for what becomes of the spans."""
        ...

    def close(self) -> None:
        """Send what is left, but not for long."""
        ...


_output: Output | None = None


def is_on() -> bool:
    """Does anybody want spans of this process?"""
    return _output is not None


def tell(make: Make, *given: Any) -> None:
    """Spans that have ended are what ``make`` makes of ``given``, a little later and in another thread, so
    nothing of it may change any more. Nothing happens where nobody wants any."""
    if _output is not None:
        _output.tell(make, given)


def use(output: Output | None) -> None:
    """Spans go there from now on."""
    global _output  # noqa: PLW0603 - one for a process
    _output = output


def open_output(service: str, service_id: str, environment: Mapping[str, str] = os.environ) -> None:
    """As the environment says. Whatever is wrong with it is said once in the log, and there are no spans."""
    if not is_wanted(environment):
        return
    try:
        from microserve.protocol.tracing.exporter import Exporter

        use(Exporter(service, service_id))
    except ImportError as error:
        _logger.warning(log.TRACING_FAILED, error=f"the extra {EXTRA} is not installed: {error}")
    except Exception as error:  # of the SDK, about its own variables
        _logger.warning(log.TRACING_FAILED, error=str(error))
    else:
        _logger.info(log.TRACING_STARTED)


def is_wanted(environment: Mapping[str, str]) -> bool:
    if environment.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "otlp").strip().lower() == "none":
        return False
    return any(environment.get(name, "").strip() for name in ENDPOINTS)


def close_output() -> None:
    output = _output
    use(None)
    if output is not None:
        output.close()
