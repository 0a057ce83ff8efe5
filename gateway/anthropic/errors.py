"""Errors as Anthropic's clients know them: which status, type and envelope each has on these paths.

Owns words. Which error is which problem is ``http/errors.py``'s.
"""

from __future__ import annotations

from typing import Any

import msgspec

from microserve.gateway.http.errors import Problem, problem_of
from microserve.protocol.errors import MeshError, PromptTooLong

OVERLOADED_STATUS = 529
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    OVERLOADED_STATUS: "overloaded_error",
}
LIMITS_OF_KEYS = frozenset(("rate_limit_exceeded", "insufficient_quota"))
"""Codes of a 429 that is the client's own; all others are of what everybody shares, and Anthropic's 529."""
TOO_LONG = "prompt is too long: "
"""The words by which agents know that it is time to compact a conversation."""

THREAD = "thread"
UNTHREADED = {"error_code": "thread_unsupported_request", "unsupported": [THREAD]}
"""Details by which Anthropic's tool runner, which asks for a thread first, knows to go on without."""


class MessagesProblem(Problem, frozen=True):
    """``param`` and ``code``, which Anthropic does not have, are those of the other APIs."""

    def envelope(self) -> bytes:
        """``{"type": "error", "error": {type, message, param, code}}`` as JSON."""
        error: dict[str, Any] = {
            "type": self.type,
            "message": self.message,
            "param": self.param,
            "code": self.code,
        }
        if self.param == THREAD:
            error["details"] = UNTHREADED
        return msgspec.json.encode({"type": "error", "error": error})


def messages_problem_of(error: MeshError) -> MessagesProblem:
    """As ``problem_of``, for ``/v1/messages`` and what is below it."""
    problem = problem_of(error)
    status = problem.status
    if status == 503 or (status == 429 and problem.code not in LIMITS_OF_KEYS):
        status = OVERLOADED_STATUS
    is_of_prompt = isinstance(error, PromptTooLong) and problem.param in (None, "messages")
    return MessagesProblem(
        status=status,
        type=_TYPES.get(status, "invalid_request_error" if 400 <= status < 500 else "api_error"),
        code=problem.code,
        message=f"{TOO_LONG}{problem.message}" if is_of_prompt else problem.message,
        param=problem.param,
        retry_after_s=problem.retry_after_s,
    )
