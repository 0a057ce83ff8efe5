"""What the model's generation_config.json says of sampling is what a silent request gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from microserve.gateway.request.defaults import FILE, SamplingDefaults
from microserve.protocol.errors import ConfigError
from microserve.protocol.messages.request.sampling import SamplingParams
from tests.support.gateway.gateway_world import gateway_world, make_model, run

# As published ones are: much of it is no matter of sampling.
CONFIG = {
    "bos_token_id": 1, "eos_token_id": [2, 3], "do_sample": True, "transformers_version": "5.0.0",
    "temperature": 0.6, "top_p": 0.9, "top_k": 20, "min_p": None, "repetition_penalty": 1.05,
    "max_new_tokens": 40,
}  # fmt: skip


def asked(directory: Path, path: str, fields: dict[str, Any], *settings: str) -> SamplingParams:
    """The sampling that reaches the router."""

    async def main() -> SamplingParams:
        async with (
            gateway_world(directory, *settings) as world,
            httpx.AsyncClient(base_url=world.address, timeout=20.0) as http,
        ):
            world.router.answer = lambda served: served.end("length")
            reply = await http.post(path, json={"model": "tiny", **fields})
            assert reply.status_code == 200, reply.text
            [served] = world.router.served.values()
            return served.message.sampling

    return run(main())


def values(sampling: SamplingParams) -> tuple[float, float, int, float, float, int]:
    return (
        *(sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p),
        *(sampling.repetition_penalty, sampling.max_tokens),
    )


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]}


@pytest.mark.slow
def test_a_silent_request_gets_the_models_and_a_word_of_its_own_wins(tmp_path: Path) -> None:
    directory = make_model(tmp_path / "tiny")
    (directory / FILE).write_text(json.dumps(CONFIG))
    chat = "/v1/chat/completions"
    assert values(asked(directory, chat, CHAT)) == (0.6, 0.9, 20, 0.0, 1.05, 40)
    assert values(asked(directory, "/v1/completions", {"prompt": "x"})) == (0.6, 0.9, 20, 0.0, 1.05, 16)
    own = {"temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": 1, "max_tokens": 50, "min_p": 0.1}
    assert values(asked(directory, chat, CHAT | own)) == (0.0, 1.0, 0, 0.1, 1.0, 50)
    off = asked(directory, chat, CHAT, "gateway.generation_config=false")
    assert (off.temperature, off.top_k, off.repetition_penalty) == (1.0, 0, 1.0)
    assert off.max_tokens > 400


@pytest.mark.parametrize(
    "content",
    ['{"temperature": -1}', '{"top_k": 1.5}', '{"max_new_tokens": 18446744073709551616}', "[]", "{"],
)
def test_a_file_that_no_request_could_say_is_a_wrong_setting(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json") as caught:
        SamplingDefaults.of_model(tmp_path)
    assert caught.value.field == "model.path"
