"""Every error in Anthropic's words: its status, its type, and when to come back."""

from __future__ import annotations

import json
from typing import Any

import pytest

from microserve.gateway.anthropic.errors import messages_problem_of
from microserve.gateway.http.errors import (
    BodyTimeout,
    BodyTooLarge,
    Forbidden,
    MethodNotAllowed,
    PathNotFound,
    problem_of,
)
from microserve.gateway.keys.quota import BudgetSpent, RateLimited
from microserve.gateway.keys.ring import Unauthorized
from microserve.gateway.routers.link import RouterLost
from microserve.protocol import errors
from microserve.protocol.errors import MeshError

KNOWN = {
    "invalid_request_error", "authentication_error", "permission_error", "not_found_error",
    "request_too_large", "rate_limit_error", "timeout_error", "api_error", "overloaded_error",
}  # fmt: skip
ROOMS = ("microserve.gateway", "microserve.protocol.errors")
CASES: list[tuple[MeshError, int, str]] = [
    (errors.InvalidRequest("x", field="tools"), 400, "invalid_request_error"),
    (Unauthorized("x"), 401, "authentication_error"),
    (Forbidden("x"), 403, "permission_error"),
    (errors.ModelNotFound("x"), 404, "not_found_error"),
    (errors.StrategyNotFound("x"), 404, "not_found_error"),
    (PathNotFound("x"), 404, "not_found_error"),
    (MethodNotAllowed("x"), 405, "invalid_request_error"),
    (BodyTimeout("x"), 408, "invalid_request_error"),
    (BodyTooLarge("x"), 413, "request_too_large"),
    (RateLimited("x", retry_after_s=2.0), 429, "rate_limit_error"),
    (BudgetSpent("x", retry_after_s=2.0), 429, "rate_limit_error"),
    (errors.QueueFull("x", retry_after_s=2.0), 529, "overloaded_error"),
    (errors.CacheFull("x", retry_after_s=2.0), 529, "overloaded_error"),
    (errors.NoEngines("x", retry_after_s=2.0), 529, "overloaded_error"),
    (errors.Draining("x", retry_after_s=2.0), 529, "overloaded_error"),
    (RouterLost("x", retry_after_s=2.0), 529, "overloaded_error"),
    (errors.EngineLost("x"), 502, "api_error"),
    (errors.DeadlineExceeded("x"), 504, "timeout_error"),
    (errors.InternalError("x"), 500, "api_error"),
    (errors.StrategyError("x"), 500, "api_error"),
]


@pytest.mark.parametrize(
    ("error", "status", "kind"), CASES, ids=lambda each: getattr(each, "code", str(each))
)
def test_an_error_in_anthropics_words(error: MeshError, status: int, kind: str) -> None:
    problem = messages_problem_of(error)
    assert (problem.status, problem.type) == (status, kind)
    assert (problem.retry_after_s is None) == (error.retry_after_s == 0.0)
    envelope: dict[str, Any] = json.loads(problem.envelope())
    assert envelope == {
        "type": "error",
        "error": {"type": kind, "message": "x", "param": problem_of(error).param, "code": problem.code},
    }


def test_every_error_that_there_is_has_a_type_that_clients_know() -> None:
    def below(kind: type[MeshError]) -> list[type[MeshError]]:
        return [kind, *(each for sub in kind.__subclasses__() for each in below(sub))]

    ours = [each for each in below(MeshError) if each.__module__.startswith(ROOMS)]
    assert len(ours) > 25
    for kind in ours:
        assert messages_problem_of(kind("x")).type in KNOWN, kind


def test_a_conversation_that_is_too_long_is_told_in_the_words_that_agents_look_for() -> None:
    error = errors.PromptTooLong("this model's maximum context length is 8 tokens", field="messages")
    problem = messages_problem_of(error)
    assert problem.message == "prompt is too long: this model's maximum context length is 8 tokens"
    assert (problem.status, problem.type) == (400, "invalid_request_error")
    assert messages_problem_of(errors.InvalidRequest("x", field="messages")).message == "x"


def test_who_asks_for_a_thread_is_told_so_that_it_goes_on_without() -> None:
    """The words are the SDK's: its tool runner then sends the whole conversation each time."""
    error = errors.InvalidRequest("thread is not supported", field="thread")
    told = json.loads(messages_problem_of(error).envelope())["error"]
    assert told["details"] == {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
