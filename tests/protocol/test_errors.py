"""The tree of errors, its codes, and the way over the wire and back."""

from __future__ import annotations

import re

import pytest

from microserve.protocol import errors
from microserve.protocol.errors import (
    CapacityError,
    InternalError,
    InvalidRequest,
    MeshError,
    PeerError,
    RequestError,
    error_for,
)


def leaves(base: type[MeshError]) -> list[type[MeshError]]:
    return [base, *(leaf for child in base.__subclasses__() for leaf in leaves(child))]


CLASSES = [cls for cls in leaves(MeshError) if cls.__module__ == errors.__name__]


def test_codes_are_stable() -> None:
    """Clients match on them: renaming one is a change of the wire."""
    assert {cls.__name__: cls.code for cls in CLASSES if cls is not MeshError} == {
        "RequestError": "request_error",
        "InvalidRequest": "invalid_request",
        "NotPermitted": "not_permitted",
        "InvalidInterval": "invalid_interval",
        "PromptTooLong": "prompt_too_long",
        "ModelNotFound": "model_not_found",
        "StrategyNotFound": "strategy_not_found",
        "UnknownRequest": "unknown_request",
        "CapacityError": "capacity",
        "CacheFull": "cache_full",
        "GrantsFull": "grants_full",
        "QueueFull": "queue_full",
        "NoEngines": "no_engines",
        "Draining": "draining",
        "PeerError": "peer_error",
        "EngineLost": "engine_lost",
        "TransferFailed": "transfer_failed",
        "DeadlineExceeded": "deadline_exceeded",
        "StrategyError": "strategy_error",
        "UnsupportedAction": "unsupported_action",
        "ProtocolViolation": "protocol_violation",
        "ConfigError": "config_error",
        "InternalError": "internal",
    }


def test_codes_are_unique() -> None:
    codes = [cls.code for cls in CLASSES if cls is not MeshError]

    assert len(codes) == len(set(codes))


def test_tree_in_the_docstring_is_the_tree() -> None:
    drawn: list[tuple[str, str]] = []
    stack: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        if found := re.match(r"([│├└─ ]*)([A-Z]\w+)", line):
            depth = len(found[1]) // 4
            del stack[depth:]
            if stack:
                drawn.append((found[2], stack[-1]))
            stack.append(found[2])

    assert sorted(drawn) == sorted((cls.__name__, cls.__mro__[1].__name__) for cls in CLASSES[1:])


@pytest.mark.parametrize("cls", CLASSES[1:], ids=lambda cls: str(cls.__name__))
def test_error_comes_back_as_it_was_sent(cls: type[MeshError]) -> None:
    sent = cls("what happened", field="f", retry_after_s=1.5)

    received = error_for(sent.code, sent.detail, field=sent.field, retry_after_s=sent.retry_after_s)

    assert type(received) is cls
    assert (received.detail, received.field, received.retry_after_s) == ("what happened", "f", 1.5)
    assert str(received) == "what happened"


def test_code_of_a_newer_peer_is_an_internal_error() -> None:
    error = error_for("invented_later", "x")

    assert type(error) is InternalError
    assert error.detail == "x"


def test_detail_is_never_empty() -> None:
    assert InvalidRequest().detail == "invalid_request"
    assert str(InvalidRequest()) == "invalid_request"


def test_groups_say_what_the_caller_should_do() -> None:
    groups = {RequestError, CapacityError, PeerError}

    assert all(sum(issubclass(cls, group) for group in groups) <= 1 for cls in CLASSES)
    assert CapacityError("full", retry_after_s=0.5).retry_after_s == 0.5
