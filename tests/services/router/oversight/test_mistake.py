"""What a strategy raises, once nothing of it can run code of the strategy's."""

from __future__ import annotations

import asyncio

import pytest

from microserve.protocol.errors import EngineLost, MeshError, StrategyError
from microserve.services.router.oversight.mistake import harmless


class Holds:
    """What a strategy's own exception may hold."""

    def __str__(self) -> str:
        raise AssertionError("its code ran")

    __repr__ = __str__


def raised_while_handling(inner: BaseException, error: BaseException) -> BaseException:
    error.__context__ = inner  # what the interpreter does
    return error


@pytest.mark.parametrize(
    "error",
    [
        asyncio.CancelledError(),
        EngineLost("engine e fell silent"),
        TimeoutError(),
        BaseExceptionGroup("both", [EngineLost("e"), asyncio.CancelledError()]),
    ],
    ids=repr,
)
def test_what_comes_while_a_strategy_handles_an_error_of_its_own_is_still_what_it_is(
    error: BaseException,
) -> None:
    found = raised_while_handling(KeyError(Holds()), error)
    assert found.__context__ is not None
    assert harmless(found) is error
    assert error.__context__ is None
    assert error.__cause__ is None


def test_an_error_of_ours_keeps_what_it_was_raised_from() -> None:
    cause = EngineLost("e")
    error = raised_while_handling(cause, MeshError("so"))
    assert harmless(error) is error
    assert error.__context__ is cause


def test_what_holds_code_of_others_is_told_of() -> None:
    class Own(Exception):
        def __str__(self) -> str:
            return "its own words"

    told = harmless(Own())
    assert isinstance(told, StrategyError)
    assert told.detail == "Own: its own words"
    assert isinstance(harmless(BaseExceptionGroup("of", [KeyError(Holds())])), StrategyError)
