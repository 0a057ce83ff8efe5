"""Odd conversations: what clients send back of calls, over HTTP, with the real helper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from tokenizers import Tokenizer

from tests.gateway.generation.test_tools import USER, client_of
from tests.support.gateway.gateway_world import gateway_world, run
from tests.support.gateway.talking_model import make_talking_model, saying, talking_tokenizer

pytestmark = pytest.mark.slow  # a gateway with its helpers, each time


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_talking_model(tmp_path_factory.mktemp("model") / "talker")


@pytest.fixture(scope="module")
def tokens() -> Tokenizer:
    return talking_tokenizer()


HUGE = '{"a": 123456789012345678901}'


@pytest.mark.parametrize("arguments", [HUGE, '{"a": "\\ud83d"}', '{"a": NaN}', "[1]"])
def test_odd_arguments_in_a_history_cost_nobody_a_helper(
    talker: Path, tokens: Tokenizer, arguments: str
) -> None:
    async def main() -> None:
        async with gateway_world(talker) as world, client_of(world) as client:
            world.router.answer = saying(tokens, "yes")
            await client.chat.completions.create(model="tiny", messages=USER)
            pids = helper_pids()
            function = {"name": "now", "arguments": arguments}
            calls = [{"id": "c1", "type": "function", "function": function}]
            messages: list[Any] = [*USER, {"role": "assistant", "tool_calls": calls}]
            if arguments == HUGE:
                await client.chat.completions.create(model="tiny", messages=messages)
                *_, served = world.router.served.values()
                assert f'"arguments": {HUGE}' in tokens.decode(served.tokens)
            else:
                with pytest.raises(openai.BadRequestError):
                    await client.chat.completions.create(model="tiny", messages=messages)
            assert helper_pids() == pids

    run(main())


def helper_pids() -> set[int]:
    return {
        child.pid
        for child in psutil.Process().children()
        if "microserve.gateway.helper.main" in child.cmdline()
    }
