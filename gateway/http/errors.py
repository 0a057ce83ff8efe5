"""Errors at the HTTP border: which status, type and code of the OpenAI envelope each one becomes.

Owns the gateway's own refusals beside ``protocol.errors``; knows nothing of sockets or requests.
"""

from __future__ import annotations

import math

import msgspec

from microserve.gateway.keys.quota import BudgetSpent, RateLimited
from microserve.gateway.keys.ring import Unauthorized
from microserve.gateway.routers.link import RouterLost
from microserve.protocol import errors
from microserve.protocol.errors import MeshError, RequestError


class Forbidden(RequestError):
    """The key may not do this."""

    code = "permission_denied"


class PathNotFound(RequestError):
    """No such path."""

    code = "not_found"


class NotKept(RequestError):
    """No answer of this name is kept, or it is another key's."""

    code = "response_not_found"


class MethodNotAllowed(RequestError):
    """The path exists, the method does not; ``allow`` names those that do."""

    code = "method_not_allowed"

    def __init__(self, detail: str, *, allow: str = "") -> None:
        super().__init__(detail)
        self.allow = allow


class NotOffered(RequestError):
    """Others have such a path; what it does there is not done here."""

    code = "not_offered"


class BodyTooLarge(RequestError):
    """More bytes than ``gateway.max_body_mb``."""

    code = "body_too_large"


class BodyTimeout(RequestError):
    """The body did not arrive in time."""

    code = "body_timeout"


class ClientGone(MeshError):
    """The client closed its connection: nobody is left to answer. The status is for logs only."""

    code = "client_disconnected"


class ClientStalled(ClientGone):
    """The client stopped reading its stream."""

    code = "client_stalled"


class Problem(msgspec.Struct, frozen=True):
    """``message``, ``type``, ``param`` and ``code`` of the envelope, with the HTTP status."""

    status: int
    type: str
    code: str
    message: str
    param: str | None
    retry_after_s: int | None
    """Whole seconds for ``Retry-After``; only where a retry makes sense."""

    def envelope(self) -> bytes:
        """``{"error": {message, type, param, code}}`` as JSON."""
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


_INVALID = "invalid_request_error"
_SERVER = "server_error"


class _Row(msgspec.Struct, frozen=True):
    status: int
    type: str
    code: str | None = None
    """OpenAI's name, where it has one of its own."""
    retry: bool = False


_ROWS: dict[type[MeshError], _Row] = {
    errors.RequestError: _Row(400, _INVALID),
    errors.InvalidRequest: _Row(400, _INVALID),
    errors.InvalidInterval: _Row(400, _INVALID),
    errors.PromptTooLong: _Row(400, _INVALID, "context_length_exceeded"),
    errors.ModelNotFound: _Row(404, _INVALID),
    errors.StrategyNotFound: _Row(404, _INVALID),
    # No client names an engine's request: reaching us, it is the mesh's mistake.
    errors.UnknownRequest: _Row(500, _SERVER),
    Unauthorized: _Row(401, "authentication_error"),
    Forbidden: _Row(403, "permission_error"),
    PathNotFound: _Row(404, _INVALID),
    NotKept: _Row(404, _INVALID),
    MethodNotAllowed: _Row(405, _INVALID),
    NotOffered: _Row(404, _INVALID),
    BodyTooLarge: _Row(413, _INVALID),
    BodyTimeout: _Row(408, _INVALID),
    errors.CapacityError: _Row(503, _SERVER, retry=True),
    RateLimited: _Row(429, "rate_limit_error", retry=True),
    BudgetSpent: _Row(429, "insufficient_quota", retry=True),
    errors.QueueFull: _Row(429, "rate_limit_error", retry=True),
    errors.CacheFull: _Row(429, "rate_limit_error", retry=True),
    errors.PeerError: _Row(502, _SERVER),
    RouterLost: _Row(503, _SERVER, retry=True),
    errors.DeadlineExceeded: _Row(504, _SERVER),
    errors.StrategyError: _Row(500, _SERVER),
    errors.ProtocolViolation: _Row(502, _SERVER),
    ClientGone: _Row(499, _INVALID),
    MeshError: _Row(500, _SERVER),
}

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 86_400.0


def problem_of(error: MeshError) -> Problem:
    """The HTTP answer to ``error``; a subclass without a row of its own answers as its parent."""
    row = next(_ROWS[cls] for cls in type(error).__mro__ if cls in _ROWS)
    param = error.field
    if param is None and isinstance(error, errors.StrategyNotFound):
        param = "x-microserve-strategy"
    if param is None and isinstance(error, errors.ModelNotFound):
        param = "model"
    retry_after_s = min(max(MIN_RETRY_AFTER_S, error.retry_after_s), MAX_RETRY_AFTER_S)
    return Problem(
        status=row.status,
        type=row.type,
        code=row.code or error.code,
        message=error.detail,
        param=param,
        retry_after_s=math.ceil(retry_after_s) if row.retry else None,
    )
