"""Every error that may cross a process border, with a stable code.

MeshError
├── RequestError          the caller's fault: do not retry
│   ├── InvalidRequest        a field is out of its bounds (names the field)
│   │   └── NotPermitted          the sender's key has no right to that
│   ├── InvalidInterval       begin/end do not fit the prompt or the grant
│   ├── PromptTooLong         more tokens than the model or the pool can hold
│   ├── ModelNotFound         the mesh serves no such model
│   ├── StrategyNotFound      no strategy of that name
│   └── UnknownRequest        the engine holds nothing under that id
├── CapacityError         nobody's fault: retry later (carries retry_after_s)
│   ├── CacheFull             no free blocks now
│   │   └── GrantsFull            no room to receive KV now
│   ├── QueueFull             no room in a bounded queue
│   ├── NoEngines             no engine is alive for that model and label
│   └── Draining              the service takes no new work
├── PeerError             another process failed: retry elsewhere
│   ├── EngineLost            the engine died, was replaced or stopped making progress
│   ├── TransferFailed        KV did not arrive whole
│   └── DeadlineExceeded      the time allowed was used up
├── StrategyError         the strategy's own fault: the author gets the detail
│   └── UnsupportedAction     it asked an engine for what that does not do
├── ProtocolViolation     a peer broke WIRE.md: log, drop, never crash
├── ConfigError           a setting is wrong (names its path)
└── InternalError         our fault
"""

from __future__ import annotations

from typing import ClassVar

import msgspec


class MeshError(Exception):
    """Base of the tree. ``code`` is stable and goes on the wire; ``detail`` is for people."""

    code: ClassVar[str] = "internal"

    def __init__(self, detail: str = "", *, field: str | None = None, retry_after_s: float = 0.0) -> None:
        super().__init__(detail or self.code)
        self.detail = detail or self.code
        self.field = field
        self.retry_after_s = retry_after_s
        self.reporter = ""
        """Id of the engine that said so, where one did; not on the wire."""
        self.suspect = ""
        """Id of the engine that failed, where it is known; not on the wire."""


class RequestError(MeshError):
    """The caller's fault; the same call would fail again, and no engine is to blame."""

    code = "request_error"


class InvalidRequest(RequestError):
    """A field is out of its bounds; ``field`` names it and ``detail`` names the bound."""

    code = "invalid_request"


class NotPermitted(InvalidRequest):
    """The sender is known, and has no right to what it asks for."""

    code = "not_permitted"


class InvalidInterval(RequestError):
    """``begin``/``end`` do not fit the prompt, the match or the grant."""

    code = "invalid_interval"


class PromptTooLong(RequestError):
    """Prompt plus output cannot fit the model's positions or the engine's pool.

    Where it is a whole request that does not fit, the detail has the words that clients look for: "maximum
    context length is N tokens".
    """

    code = "prompt_too_long"


class ModelNotFound(RequestError):
    """The mesh serves no model of that name."""

    code = "model_not_found"


class StrategyNotFound(RequestError):
    """The router knows no strategy of that name."""

    code = "strategy_not_found"


class UnknownRequest(RequestError):
    """The engine holds no tokens or no grant under that id."""

    code = "unknown_request"


class CapacityError(MeshError):
    """Nobody's fault: retry after ``retry_after_s`` seconds."""

    code = "capacity"


class CacheFull(CapacityError):
    """The pool has too few free blocks at this moment."""

    code = "cache_full"


class GrantsFull(CacheFull):
    """No room to receive KV at this moment; what is generated where it is computed needs none."""

    code = "grants_full"


class QueueFull(CapacityError):
    """A bounded queue is at its limit."""

    code = "queue_full"


class NoEngines(CapacityError):
    """No engine is alive for the model and label asked for."""

    code = "no_engines"


class Draining(CapacityError):
    """The service finishes what it has and takes nothing new."""

    code = "draining"


class PeerError(MeshError):
    """Another process failed; the same work may succeed elsewhere."""

    code = "peer_error"


class EngineLost(PeerError):
    """The engine died, restarted with a new incarnation, or stopped making progress."""

    code = "engine_lost"


class TransferFailed(PeerError):
    """KV did not arrive whole: writer poisoned it, died, or its bytes did not verify."""

    code = "transfer_failed"


class DeadlineExceeded(PeerError):
    """The time that the caller allowed was used up."""

    code = "deadline_exceeded"


class StrategyError(MeshError):
    """A strategy broke its contract (two generates, forgotten grant, gap between intervals ...)."""

    code = "strategy_error"
    at = ""
    """``FILE:LINE`` of its source, where no traceback says it; not on the wire."""


class UnsupportedAction(StrategyError):
    """An engine was asked for what it does not do (``EngineInfo.can``); the detail names both."""

    code = "unsupported_action"


class ProtocolViolation(MeshError):
    """A peer broke WIRE.md."""

    code = "protocol_violation"


class ConfigError(MeshError):
    """A setting is wrong; ``field`` is its dotted path."""

    code = "config_error"


class InternalError(MeshError):
    """A bug of ours; the event log has the traceback."""

    code = "internal"


def _leaves(base: type[MeshError]) -> list[type[MeshError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in _leaves(child))]


_BY_CODE: dict[str, type[MeshError]] = {cls.code: cls for cls in _leaves(MeshError) if cls is not MeshError}


def error_for(code: str, detail: str, *, field: str | None = None, retry_after_s: float = 0.0) -> MeshError:
    """The exception for a wire code; an unknown code (a newer peer) becomes ``InternalError``."""
    cls = _BY_CODE.get(code, InternalError)
    return cls(detail, field=field, retry_after_s=retry_after_s)


def located(error: msgspec.ValidationError) -> tuple[str, str]:
    """What msgspec refused: the path of the field, dotted and without the root (empty: the whole), and why.

    msgspec says it in words: ``... - at `$.router.strategies` ``, ``... - at `key` in `$.logit_bias` ``;
    an unknown or a missing field is named in the message.
    """
    message, _, where = str(error).partition(" - at `")
    path = where.partition("$")[2].rstrip("`").removesuffix("[...]").removeprefix(".")
    if "unknown field" in message or "missing required field" in message:
        named = message.rpartition("`")[0].rpartition("`")[2]
        path = f"{path}.{named}" if path else named
    return path, message
