"""Errors -> HTTP."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from microserve.gateway.http.errors import (
    MAX_RETRY_AFTER_S,
    BodyTooLarge,
    Forbidden,
    problem_of,
)
from microserve.gateway.keys.quota import BudgetSpent, RateLimited
from microserve.gateway.keys.ring import Unauthorized
from microserve.gateway.routers.link import RouterLost
from microserve.protocol import errors
from microserve.protocol.errors import MeshError


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param", "retry"),
    [
        (
            errors.InvalidRequest("x", field="top_p"),
            400,
            "invalid_request_error",
            "invalid_request",
            "top_p",
            None,
        ),
        (errors.InvalidInterval("x"), 400, "invalid_request_error", "invalid_interval", None, None),
        (Forbidden("x"), 403, "permission_error", "permission_denied", None, None),
        (RateLimited("x", retry_after_s=7200.5), 429, "rate_limit_error", "rate_limit_exceeded", None, 7201),
        (BudgetSpent("x"), 429, "insufficient_quota", "insufficient_quota", None, 1),
        (Unauthorized("x"), 401, "authentication_error", "invalid_api_key", None, None),
        (errors.ModelNotFound("x"), 404, "invalid_request_error", "model_not_found", "model", None),
        (
            errors.StrategyNotFound("x"),
            404,
            "invalid_request_error",
            "strategy_not_found",
            "x-microserve-strategy",
            None,
        ),
        (errors.PromptTooLong("x"), 400, "invalid_request_error", "context_length_exceeded", None, None),
        (BodyTooLarge("x"), 413, "invalid_request_error", "body_too_large", None, None),
        (errors.QueueFull("x", retry_after_s=2.2), 429, "rate_limit_error", "queue_full", None, 3),
        (errors.CacheFull("x"), 429, "rate_limit_error", "cache_full", None, 1),
        (errors.NoEngines("x", retry_after_s=0.2), 503, "server_error", "no_engines", None, 1),
        (errors.Draining("x"), 503, "server_error", "draining", None, 1),
        (RouterLost("x"), 503, "server_error", "router_lost", None, 1),
        (errors.DeadlineExceeded("x"), 504, "server_error", "deadline_exceeded", None, None),
        (errors.EngineLost("x"), 502, "server_error", "engine_lost", None, None),
        (errors.TransferFailed("x"), 502, "server_error", "transfer_failed", None, None),
        (errors.ProtocolViolation("x"), 502, "server_error", "protocol_violation", None, None),
        (errors.StrategyError("x"), 500, "server_error", "strategy_error", None, None),
        (errors.UnknownRequest("x"), 500, "server_error", "unknown_request", None, None),
        (errors.UnsupportedAction("x"), 500, "server_error", "unsupported_action", None, None),
        (errors.InternalError("x"), 500, "server_error", "internal", None, None),
    ],
)
def test_the_answer_to_each_error(
    error: MeshError, status: int, kind: str, code: str, param: str | None, retry: int | None
) -> None:
    problem = problem_of(error)
    assert (problem.status, problem.retry_after_s) == (status, retry)
    assert json.loads(problem.envelope()) == {
        "error": {"message": "x", "type": kind, "param": param, "code": code}
    }


@given(seconds=st.floats())
def test_any_hint_of_a_peer_becomes_a_sane_header(seconds: float) -> None:
    retry = problem_of(errors.CacheFull("x", retry_after_s=seconds)).retry_after_s
    assert retry is not None and 1 <= retry <= MAX_RETRY_AFTER_S
    if 1 <= seconds <= MAX_RETRY_AFTER_S:
        assert retry == math.ceil(seconds)


def test_every_error_of_the_mesh_has_an_answer() -> None:
    def leaves(base: type[MeshError]) -> list[type[MeshError]]:
        return [base, *(leaf for child in base.__subclasses__() for leaf in leaves(child))]

    # Errors that other floors have for themselves never reach a gateway.
    for kind in leaves(MeshError):
        if not kind.__module__.startswith(("microserve.protocol", "microserve.gateway")):
            continue
        assert 400 <= problem_of(kind("x")).status <= 599
