"""What people do with the ``openai`` package, each with its right outcome; docs/api.md lists them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import openai
import pytest

from microserve.protocol.messages.engine import TokenLogprob
from tests.gateway.probes import chat, completions, elsewhere, responses, structured, tools
from tests.gateway.probes.probe import KEY, PROBES, Bench, Probe
from tests.support.gateway.gateway_world import Served, special_id
from tests.support.gateway.living import Living
from tests.support.gateway.talking_model import make_talking_model, talking_tokenizer

pytestmark = pytest.mark.slow

ROOMS = (chat, completions, elsewhere, responses, structured, tools)
LEAST = 52


class Said:
    """What the engine says; and how the router refuses what comes next."""

    def __init__(self) -> None:
        self.tokenizer = talking_tokenizer()
        self.stop = special_id(self.tokenizer, "<|im_end|>")
        self.text = ""
        self.fails: list[str] = []

    def __call__(self, served: Served) -> None:
        if self.fails:
            code = self.fails.pop(0)
            if code != "silence":
                served.end("error", code=code, detail="not now")
            return
        wanted = served.message.sampling.logprobs
        for token_id in [*self.tokenizer.encode(self.text).ids, self.stop]:
            others = [] if wanted is None else [(token_id, -0.5), (0, -2.0)][:wanted]
            logprobs = [] if wanted is None else [TokenLogprob(-0.5, others)]
            served.send([token_id], logprobs=logprobs)
        served.end("stop", stop_token_id=self.stop)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    said = Said()
    directory = make_talking_model(tmp_path_factory.mktemp("model") / "talker")
    settings = (f'gateway.api_keys=["{KEY}"]', 'gateway.attributes=["user"]')
    with contextlib.closing(Living(directory, *settings, answer=said, eos_token_ids=[said.stop])) as living:
        client = openai.OpenAI(base_url=f"{living.address}/v1", api_key=KEY, max_retries=0, timeout=60.0)
        with client:
            yield Bench(client, living, said.tokenizer, said.fails)


@pytest.mark.parametrize("probe", PROBES, ids=lambda probe: f"{probe.room}-{probe.run.__name__}")
def test_it_is_as_openai_has_it(bench: Bench, probe: Probe) -> None:
    said = bench.living.answer
    assert isinstance(said, Said)
    said.text, said.fails[:] = probe.says, []
    if probe.refused is None:
        probe.run(bench)
        return
    status, param = probe.refused
    with pytest.raises(openai.APIStatusError) as caught:
        probe.run(bench)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert caught.value.code and caught.value.type and caught.value.message
    assert bench.client.models.list().data  # and the service lives on


def test_there_are_enough_of_them_and_none_twice() -> None:
    assert len(PROBES) >= LEAST
    assert len({probe.what for probe in PROBES}) == len(PROBES)
    assert {probe.room for probe in PROBES} == {room.__name__.rpartition(".")[2] for room in ROOMS}
